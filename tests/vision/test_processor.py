from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_clip, make_llava, make_tokenizer
from PIL import Image

from nanovllm.errors import ConfigurationError, PlaceholderMismatch, TooManyPixels, counted
from nanovllm.layers.vision import VisionEncoder, VisionProcessor
from nanovllm.vision.embedding_cache import EmbeddingCache
from nanovllm.vision.images.decode import ImageLimits

pytestmark = pytest.mark.filterwarnings("ignore:The projector between")


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 60, 3), dtype=np.uint8))


@pytest.fixture
def encoder(tmp_path: Path) -> VisionEncoder:
    return VisionEncoder.from_llava(make_llava(tmp_path, patch=16, size=64))


def test_the_guides_feature_extraction(tmp_path: Path) -> None:
    encoder = VisionEncoder(hidden_size=768, vision_model=str(make_clip(tmp_path)))
    processor = VisionProcessor(encoder)
    features, num_tokens = processor.process_images([np.array(image(0)), image(1)])
    assert features.shape == (2 * 49, 768)
    assert num_tokens == 49
    alone, _ = processor.process_images([image(1)])
    assert torch.allclose(features[49:], alone, atol=1e-4)


def test_no_images_have_no_features(encoder: VisionEncoder) -> None:
    features, num_tokens = VisionProcessor(encoder).process_images([])
    assert features.shape == (0, 64)
    assert num_tokens == 16


def test_placeholders_are_repeated_and_their_places_told(encoder: VisionEncoder) -> None:
    processor = VisionProcessor(encoder)
    run = "<|image|>" * 16
    text, positions = processor.replace_image_placeholders("a <|image|> and <|image|>", [image(0), image(1)])
    assert text == f"a {run} and {run}"
    assert [text[position:].startswith(run) for position in positions] == [True, True]
    assert positions == [2, 2 + len(run) + 5]
    assert processor.replace_image_placeholders("no image", []) == ("no image", [])


@pytest.mark.parametrize(("prompt", "num_images"), [("<|image|> <|image|>", 1), ("<|image|>", 2), ("none", 1)])
def test_a_mismatch_names_both_numbers(encoder: VisionEncoder, prompt: str, num_images: int) -> None:
    with pytest.raises(PlaceholderMismatch) as caught:
        VisionProcessor(encoder).replace_image_placeholders(prompt, [image(0)] * num_images)
    placeholders = counted(prompt.count("<|image|>"), "<|image|> placeholder")
    assert f"{placeholders} for {counted(num_images, 'image')}" in str(caught.value)


def test_token_ids_come_from_the_tokenizer_or_the_number_given(encoder: VisionEncoder) -> None:
    tokenizer = make_tokenizer()
    from_tokenizer = VisionProcessor(encoder, tokenizer=tokenizer)
    assert from_tokenizer.get_image_token_ids(2) == [tokenizer.convert_tokens_to_ids("<|image|>")] * 32
    assert VisionProcessor(encoder, image_token_id=7).get_image_token_ids(1) == [7] * 16
    assert VisionProcessor(encoder, image_token="<img>", image_token_id=7).image_token == "<img>"
    for unknowing in (VisionProcessor(encoder), VisionProcessor(encoder, tokenizer=make_tokenizer(image_token=False))):
        with pytest.raises(ConfigurationError, match="needs image_token_id="):
            unknowing.get_image_token_ids(1)


def test_each_distinct_image_is_encoded_once(encoder: VisionEncoder) -> None:
    processor = VisionProcessor(encoder, cache=EmbeddingCache(1 << 20))
    prepared = [processor.prepare(image(seed)) for seed in (0, 1, 0)]
    embedded = processor.embed(prepared)
    assert [outcome for _, outcome in embedded] == ["miss", "miss", "joined"]
    assert [tensor.shape for tensor, _ in embedded] == [(16, 64)] * 3
    assert torch.equal(embedded[0][0], embedded[2][0])
    assert not torch.equal(embedded[0][0], embedded[1][0])
    assert [outcome for _, outcome in processor.embed(prepared)] == ["hit"] * 3
    assert encoder.images_encoded == 2
    processor.cache.audit()


def test_a_cached_embedding_holds_its_own_storage(encoder: VisionEncoder) -> None:
    processor = VisionProcessor(encoder, cache=EmbeddingCache(1 << 20))
    for tensor, _ in processor.embed([processor.prepare(image(seed)) for seed in range(5)]):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_tenants_do_not_share_embeddings(encoder: VisionEncoder) -> None:
    processor = VisionProcessor(encoder, cache=EmbeddingCache(1 << 20))
    prepared = [processor.prepare(image(0))]
    assert processor.embed(prepared, salt=b"one")[0][1] == "miss"
    assert processor.embed(prepared, salt=b"two")[0][1] == "miss"
    assert processor.embed(prepared, salt=b"one")[0][1] == "hit"


def test_encoders_with_other_weights_do_not_share_embeddings(tmp_path: Path, encoder: VisionEncoder) -> None:
    other = VisionEncoder.from_llava(make_llava(tmp_path / "other", patch=16, size=64, seed=8))
    cache = EmbeddingCache(1 << 20)
    first, second = VisionProcessor(encoder, cache=cache), VisionProcessor(other, cache=cache)
    ((one, _),) = first.embed([first.prepare(image(0))])
    ((two, outcome),) = second.embed([second.prepare(image(0))])
    assert outcome == "miss"
    assert not torch.equal(one, two)


def test_a_prepared_image_is_taken_as_it_is_and_limits_hold_for_the_rest(encoder: VisionEncoder) -> None:
    processor = VisionProcessor(encoder, limits=ImageLimits(max_pixels=2999))
    with pytest.raises(TooManyPixels, match="3000 pixels"):
        processor.prepare(image(0))
    prepared = VisionProcessor(encoder).prepare(image(0))
    assert processor.prepare(prepared) is prepared
    assert encoder.num_tokens(prepared.size) == 16
