"""Qwen's towers: the same pixels, the same embeddings as in transformers, whatever else is in the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import QwenVL, make_qwen3, make_qwen_vl
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from nanovllm.errors import ConfigurationError, InvalidImage, UnsupportedModel
from nanovllm.vision.encoders.qwen import NativeEncoder
from nanovllm.vision.images.preprocess import ImageTransform, PreparedImage, prepare_image

FAMILIES: tuple[QwenVL, ...] = ("qwen2_5_vl", "qwen3_vl")
SIZES = [(64, 64), (200, 90), (90, 200), (31, 300), (1, 1), (999, 640), (57, 113)]


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(1000 * width + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen_vl(tmp_path_factory.mktemp(request.param), family=request.param)


def prepared(encoder: NativeEncoder, *sizes: tuple[int, int]) -> list[PreparedImage]:
    return [prepare_image(picture(*size), encoder.transform) for size in sizes]


def test_embeddings_equal_transformers_from_pixels_to_the_last_level(checkpoint: Path) -> None:
    encoder = NativeEncoder(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    inputs = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)(
        [picture(*size) for size in SIZES], return_tensors="pt"
    )
    with torch.no_grad():
        expected = model.model.get_image_features(**inputs)
    images = prepared(encoder, *SIZES)
    found = encoder.embed(images)
    # transformers 5.17 has one tensor for all images.
    deep = [
        level.split([len(one) for one in found]) if isinstance(level, torch.Tensor) else level
        for level in getattr(expected, "deepstack_features", ())
    ]
    for place, (image, embedding) in enumerate(zip(images, found, strict=True)):
        levels = [expected.pooler_output[place]]
        levels += [level[place] for level in deep]
        assert embedding.shape == (encoder.num_tokens(image.size), encoder.width)
        assert encoder.grid(image.size) == tuple((inputs["image_grid_thw"][place, 1:] // 2).tolist())
        assert torch.allclose(embedding, torch.cat(levels, -1), atol=1e-4)
    assert encoder.images_encoded == len(SIZES)


def test_pixels_equal_transformers_bit_for_bit(checkpoint: Path) -> None:
    encoder = NativeEncoder(checkpoint)
    for size in SIZES:
        expected = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)([picture(*size)], return_tensors="pt")
        (image,) = prepared(encoder, size)
        assert image.pixels is not None
        assert torch.equal(encoder._patches(torch.from_numpy(image.pixels)), torch.as_tensor(expected["pixel_values"]))


def test_an_image_alone_and_among_others_are_embedded_alike(checkpoint: Path) -> None:
    encoder = NativeEncoder(checkpoint)
    images = prepared(encoder, *SIZES)
    for together, image in zip(encoder.embed(images), images, strict=True):
        assert torch.allclose(together, encoder.embed([image])[0], atol=1e-5)


def test_one_at_a_time_they_are_the_same_bits_in_any_company(checkpoint: Path) -> None:
    encoder = NativeEncoder(checkpoint)
    encoder.batch_size = 1
    images = prepared(encoder, *SIZES)
    for together, image in zip(encoder.embed(images), images, strict=True):
        assert torch.equal(together, encoder.embed([image])[0])


def test_a_batch_goes_through_the_tower_in_parts_of_bounded_size(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = NativeEncoder(checkpoint)
    images = prepared(encoder, *SIZES)
    expected = encoder.embed(images)
    encoder.batch_patches = 64
    parts: list[int] = []
    run = encoder._run
    monkeypatch.setattr(encoder, "_run", lambda batch: parts.append(len(batch)) or run(batch))
    for found, wanted in zip(encoder.embed(images), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)
    assert len(parts) > 3
    assert sum(parts) == len(SIZES)


@pytest.mark.parametrize("tokens", [1, 4, 9, 30])
@pytest.mark.parametrize("size", [*SIZES, (2000, 10), (10, 2000), (1, 199)])
def test_no_image_takes_more_than_the_tokens_allowed(checkpoint: Path, tokens: int, size: tuple[int, int]) -> None:
    encoder = NativeEncoder(checkpoint, max_image_tokens=tokens)
    (image,) = prepared(encoder, size)
    assert 1 <= encoder.num_tokens(image.size) <= tokens == encoder.num_vision_tokens
    assert encoder.accepts(image.size)


def test_pixel_bounds_stand_in_for_the_checkpoints(checkpoint: Path) -> None:
    square = NativeEncoder(checkpoint).transform.size[2]
    encoder = NativeEncoder(checkpoint, min_pixels=9 * square**2, max_pixels=16 * square**2)
    assert [encoder.num_tokens(image.size) for image in prepared(encoder, (8, 8), (500, 500))] == [9, 16]
    small = NativeEncoder(checkpoint, max_image_size=3 * square + 1)
    assert [small.num_tokens(image.size) for image in prepared(small, (500, 500))] == [9]
    assert NativeEncoder(checkpoint, max_image_size=10**4).transform == (NativeEncoder(checkpoint).transform)
    for options in (
        {"max_pixels": square**2 - 1},
        {"max_image_size": square - 1},
        {"min_pixels": 10**6, "max_pixels": 10**5},
    ):
        with pytest.raises(ConfigurationError, match="see min_pixels, max_pixels, max_image_size"):
            NativeEncoder(checkpoint, **options)


def test_other_sizes_than_the_transforms_are_not_accepted(checkpoint: Path) -> None:
    encoder = NativeEncoder(checkpoint)
    square = encoder.transform.size[2]
    assert encoder.accepts((square, 2 * square))
    assert not any(map(encoder.accepts, [(0, square), (square, square + 1), (100 * square, 100 * square)]))


def test_images_too_narrow_are_refused(checkpoint: Path) -> None:
    encoder = NativeEncoder(checkpoint)
    prepared(encoder, (200, 1))
    with pytest.raises(InvalidImage, match="201x1 pixels is too narrow: 200:1"):
        prepared(encoder, (201, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_old_names_shards_and_half_precision_load(tmp_path: Path, family: QwenVL) -> None:
    small = make_qwen_vl(tmp_path / "whole", family=family)
    sharded = make_qwen_vl(tmp_path / "shards", family=family, max_shard_size="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one, other = NativeEncoder(small), NativeEncoder(sharded)
    assert one.revision == other.revision
    half = NativeEncoder(small, dtype=torch.bfloat16)
    assert half.revision != one.revision
    exact, rounded = (encoder.embed(prepared(encoder, (90, 90)))[0] for encoder in (one, half))
    assert rounded.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.float().flatten(), 0) > 0.999


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_tensor_below_the_towers_prefix_that_has_no_place_in_it_is_refused_by_its_name(
    tmp_path: Path, family: QwenVL
) -> None:
    make_qwen_vl(tmp_path, family=family)
    stored = load_file(tmp_path / "model.safetensors")
    prefix = next(name.split("visual.")[0] for name in stored if "visual." in name)
    for name in ("blocks.4.norm1.weight", "adapter.weight"):
        save_file({**stored, f"{prefix}visual.{name}": torch.ones(2)}, tmp_path / "model.safetensors")
        with pytest.raises(UnsupportedModel, match=f"tensor '{prefix}visual.{name}' has no place"):
            NativeEncoder(tmp_path)


def test_other_checkpoints_and_preprocessors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="'qwen3' checkpoint, not a Qwen-VL one"):
        NativeEncoder(make_qwen3(tmp_path / "text"))
    directory = make_qwen_vl(tmp_path / "vl")
    file = directory / "preprocessor_config.json"
    fields = json.loads(file.read_text())
    for change, message in (({"merge_size": 3}, "multiples of 28"), ({"do_resize": False}, "do_resize")):
        file.write_text(json.dumps({**fields, **change}))
        with pytest.raises(UnsupportedModel, match=message):
            NativeEncoder(directory)


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2}, (3136, 12845056, 28)),
        ({"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16}, (65536, 16777216, 32)),
        ({}, (3136, 1003520, 28)),
    ],
)
def test_both_ways_of_writing_the_bounds_are_read(fields: dict[str, Any], size: tuple[int, int, int]) -> None:
    transform = ImageTransform.from_preprocessor_config({"image_processor_type": "Qwen2VLImageProcessorFast", **fields})
    assert (transform.resize, transform.size, transform.output_size) == ("pixel_budget", size, None)
    assert ImageTransform.from_json(transform.to_json()) == transform
