"""Image-text models of transformers over the engine's attention: as transformers' own processor and generation."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import edit_json
from checkpoints import QwenVL, make_llava, make_qwen_vl
from generic_checkpoints import IMAGE_FAMILIES, make_generic_images, make_generic_text, written_image
from generic_parts import GREEDY, NEW, Recorded, assert_same, needs_release, transformers_answer
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.capabilities import Capabilities
from nanovllm.engine.backends.native import GENERIC, GENERIC_WITH_STATES, AsyncEngine
from nanovllm.engine.config import IMAGE_BOUNDS
from nanovllm.engine.diagnostics import describe
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.models.generic import GenericDecoder
from nanovllm.errors import ConfigurationError, InvalidImage, UnsupportedModel
from nanovllm.sampling_params import SamplingParams
from nanovllm.vision.encoders.generic import GenericEncoder
from nanovllm.vision.images.pool import DecoderPool
from nanovllm.vision.images.preprocess import prepare_rgb

pytestmark = needs_release

SMALL: dict[str, Any] = {"backend": "generic", "max_model_len": 320, "block_size": 16}
STATEFUL = ("qwen3_5", "qwen3_5_moe")
IN_TILES = ("idefics3", "granite_docling", "internvl", "deepseek_ocr2")
NOT_AS_OTHERS = ("gemma3", "lfm2_vl", "llava_onevision", "idefics2", "ernie4_5_vl_moe", "got_ocr2")


def picture(seed: int, height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


ONE = [picture(1, 40, 60)]
TALL = picture(2, 64, 32)
THREE = [TALL, picture(3, 90, 130), TALL]
LARGE = [picture(4, 800, 1600)]


def record_threads(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads in which the model's processor is called."""
    encoder, names = engine.model_runner.encoder, list[str]()
    assert isinstance(encoder, GenericEncoder)
    processor = encoder._processor

    def record(pixels: np.ndarray) -> Any:
        names.append(threading.current_thread().name)
        return processor(pixels)

    monkeypatch.setattr(encoder, "_processor", record)
    return names


def transformers_inputs(
    engine: LLMEngine, text: str, images: Sequence[Image.Image], *, nested: bool = True
) -> dict[str, Any]:
    """A prompt as the model's own processor makes it, all images at once, nested as `apply_chat_template` has them."""
    encoder = engine.model_runner.encoder
    assert isinstance(encoder, GenericEncoder)
    processor = encoder._processor._processor
    given = ([list(images)] if nested else list(images)) if images else None
    found = processor(text=[text], images=given, return_mm_token_type_ids=True, return_tensors="pt")
    decoder = engine.model_runner.model
    assert isinstance(decoder, GenericDecoder)
    if not hasattr(decoder.model.base_model, "get_rope_index"):
        found.pop("mm_token_type_ids", None)
    return dict(found)


def num_tiles(inputs: dict[str, Any]) -> int:
    """Pictures that a tower sees of an image, where it sees pictures and not patches."""
    return sum(value.flatten(0, -4).shape[0] for name, value in inputs.items() if name.startswith("pixel_values"))


@pytest.mark.parametrize("family", [family for family in IMAGE_FAMILIES if family not in NOT_AS_OTHERS])
def test_logits_and_greedy_tokens_are_those_of_processor_and_cached_generation(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_generic_images(tmp_path, family)
    image = written_image(family)
    texts = ["What is the total?", f"Describe this: {image} as JSON", f"{image} and {image}, not {image} hello"]
    pictures: list[list[Image.Image]] = [[], ONE, THREE]
    options = {**SMALL, "max_num_batched_tokens": 16, "num_speculative_tokens": 0}
    if family == "deepseek_ocr2":  # its tiles have 768 pixels a side, and 144 tokens
        pictures[1], options["max_model_len"] = LARGE, 640
    tolerance = 1e-4 if family in STATEFUL else 1e-5
    plain = AutoModelForImageTextToText.from_pretrained(directory).eval()
    with LLMEngine(str(directory), **options) as engine:
        recorded = Recorded(engine, monkeypatch)
        decoder = engine.model_runner.model
        assert isinstance(decoder, GenericDecoder)
        without = decoder.never_sampled
        inputs = [transformers_inputs(engine, text, images) for text, images in zip(texts, pictures, strict=True)]
        assert family not in IN_TILES or num_tiles(inputs[1]) > 1
        wanted = [transformers_answer(plain, one, without) for one in inputs]
        together = recorded.answers(texts, pictures)
        assert recorded.is_mixed
        assert engine.stats().encoder_images == len({id(one) for images in pictures for one in images})
        alone = [recorded.answers([text], [images])[0] for text, images in zip(texts, pictures, strict=True)]
        longest = max(one["input_ids"].shape[1] for one in inputs) + NEW
        preempted = recorded.preempted(texts, pictures, tokens=longest)
        for found in (together, alone, preempted):
            for one, answer in zip(found, wanted, strict=True):
                assert_same(one, answer, tolerance, without)


@pytest.mark.parametrize("family", ["idefics3", "qwen2_vl", "qwen3_5"])
def test_a_preempted_request_with_images_stays_the_same(family: str, tmp_path: Path) -> None:
    directory, image = make_generic_images(tmp_path, family), written_image(family)
    texts, pictures = [f"{image} {number} {image}" for number in range(3)], [[ONE[0], THREE[1]]] * 3
    with LLMEngine(str(directory), **SMALL) as roomy:
        runner = roomy.model_runner
        wanted = [output.token_ids for output in roomy.generate(texts, GREEDY, pictures, use_tqdm=False)]
        block_bytes = sum(cache.nbytes for cache in runner.kv_caches) // runner.num_blocks
    with LLMEngine(str(directory), **SMALL, kv_cache_bytes=13 * block_bytes) as engine:
        found = [output.token_ids for output in engine.generate(texts, GREEDY, pictures, use_tqdm=False)]
        assert engine.stats().num_preemptions > 0
        engine.audit()
    assert found == wanted


def test_a_prefix_is_reused_for_the_same_image_alone(tmp_path: Path) -> None:
    directory, image = make_generic_images(tmp_path, "idefics3"), written_image("idefics3")
    with LLMEngine(str(directory), **SMALL) as engine:
        text = f"Describe this image: {image} What is the total?"
        first = engine.generate(text, GREEDY, ONE, use_tqdm=False)[0]
        engine.generate(text, GREEDY, [picture(9, 40, 60)], use_tqdm=False)
        assert engine.stats().prefix_cache_hits == 0
        again = engine.generate(text, GREEDY, ONE, use_tqdm=False)[0]
        assert engine.stats().prefix_cache_hits >= 32
        assert engine.stats().encoder_images == 2
    assert again.token_ids == first.token_ids


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_hand_written_family_and_transformers_layers_give_the_same(
    family: QwenVL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_qwen_vl(tmp_path, family=family)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    texts, pictures = [f"Describe {image} as JSON", f"{image} and {image}", "hello"], [ONE, THREE[:2], []]
    answers = []
    # The hand-written families may sample image tokens.
    without_images = GREEDY.model_copy(update={"logit_bias": dict.fromkeys(range(384, 386), -100.0)})
    for backend in ("generic", "native"):
        with LLMEngine(str(directory), **{**SMALL, "backend": backend}, num_speculative_tokens=0) as engine:
            assert isinstance(engine.model_runner.model, GenericDecoder) == (backend == "generic")
            answers.append(Recorded(engine, monkeypatch).answers(texts, pictures, without_images))
            if isinstance(engine.model_runner.model, GenericDecoder):
                without = engine.model_runner.model.never_sampled
    for generic, native in zip(*answers, strict=True):
        assert_same(generic, native, 1e-5, without)


def test_equal_checkpoints_have_equal_embeddings_wherever_they_lie(tmp_path: Path) -> None:
    revisions = set()
    for name in ("one", "other"):
        with LLMEngine(str(make_generic_images(tmp_path / name, "mistral3")), **SMALL) as engine:
            assert engine.processor is not None
            revisions.add(engine.processor.encoder.revision)
    assert len(revisions) == 1


def test_llava_over_a_text_family_without_code_runs_through_transformers_layers(tmp_path: Path) -> None:
    directory = make_llava(tmp_path, size=64, text="mistral", sliding_window=None)
    image = Image.fromarray(np.full((64, 64, 3), 90, np.uint8))
    with LLMEngine(str(directory), **{**SMALL, "backend": "auto"}) as engine:
        assert isinstance(engine.model_runner.model, GenericDecoder)
        assert len(engine.generate("<|image|> hello", GREEDY, [image], use_tqdm=False)[0].token_ids) == 64


def test_an_image_token_is_never_sampled(tmp_path: Path) -> None:
    directory = make_generic_images(tmp_path, "idefics3")
    with LLMEngine(str(directory), **SMALL) as engine:
        token = engine.model_runner.image_token_id
        params = GREEDY.model_copy(update={"logit_bias": {token: 100.0}})
        (output,) = engine.generate("hello", params, use_tqdm=False)
    assert token not in output.token_ids


def test_what_doctor_says_counts_the_tokens_of_an_image(tmp_path: Path) -> None:
    with LLMEngine(str(make_generic_images(tmp_path, "idefics3")), **SMALL) as engine:
        (support,) = [finding for finding in describe(engine) if finding.subject == "support"]
        encoder = engine.model_runner.encoder
        assert encoder is not None
        (embedding,) = encoder.embed_largest(320)
    assert embedding.shape == (20, encoder.width)  # of several tiles
    assert "measured over 320 tokens, 56 of images among them" in support.value


def test_a_model_whose_images_depend_on_their_number_serves_one_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, text = make_generic_images(tmp_path, "llava_onevision"), "Describe <image> as JSON"
    with pytest.raises(UnsupportedModel, match=r"other tokens of 'a<image>b<image>' .*; max_images_per_request=1 allo"):
        LLMEngine(str(directory), **SMALL)
    plain = AutoModelForImageTextToText.from_pretrained(directory).eval()
    with LLMEngine(str(directory), **SMALL, max_images_per_request=1, num_speculative_tokens=0) as engine:
        (found,) = Recorded(engine, monkeypatch).answers([text], [ONE])
        assert isinstance(engine.model_runner.model, GenericDecoder)
        without = engine.model_runner.model.never_sampled
        wanted = transformers_answer(plain, transformers_inputs(engine, text, ONE), without)
    assert_same(found, wanted, 1e-5, without)


def test_a_processor_that_takes_no_nested_lists_and_no_text_alone_serves_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, text = make_generic_images(tmp_path, "got_ocr2"), "<img><imgpad></img> OCR"
    plain = AutoModelForImageTextToText.from_pretrained(directory).eval()
    with LLMEngine(str(directory), **{**SMALL, "max_model_len": 400}, num_speculative_tokens=0) as engine:
        found, _ = Recorded(engine, monkeypatch).answers([text, "hello"], [ONE, []])
        assert isinstance(engine.model_runner.model, GenericDecoder)
        without = engine.model_runner.model.never_sampled
        wanted = transformers_answer(plain, transformers_inputs(engine, text, ONE, nested=False), without)
    assert_same(found, wanted, 1e-5, without)


def test_features_that_depend_on_the_other_images_fail_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, features = make_generic_images(tmp_path, "qwen2_vl"), Qwen2VLModel.get_image_features

    def together(self: Any, pixel_values: Any, image_grid_thw: Any, **options: Any) -> Any:
        return features(self, pixel_values * len(image_grid_thw), image_grid_thw, **options)

    monkeypatch.setattr(Qwen2VLModel, "get_image_features", together)
    with pytest.raises(UnsupportedModel, match=r"depend on the others: max_images_per_request=1 tries one"):
        LLMEngine(str(directory), **SMALL)
    LLMEngine(str(directory), **SMALL, max_images_per_request=1).close()


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("idefics2", r"other tokens of 'a<image>b' than this engine, .*; enable_multimodal=False serves its text"),
        ("ernie4_5_vl_moe", r"which tokens are those of images \(moe_mm_token_type_ids\).*; enable_multimodal=False"),
    ],
)
def test_images_that_would_be_told_otherwise_are_refused_and_text_is_served(
    family: str, message: str, tmp_path: Path
) -> None:
    directory = make_generic_images(tmp_path, family)
    with pytest.raises(UnsupportedModel, match=message):
        LLMEngine(str(directory), **SMALL)
    with LLMEngine(str(directory), **SMALL, enable_multimodal=False) as engine:
        assert len(engine.generate("hello", GREEDY, use_tqdm=False)[0].token_ids) == GREEDY.max_tokens


def test_a_processor_that_takes_no_image_makes_the_model_an_unsupported_one(tmp_path: Path) -> None:
    directory = make_generic_images(tmp_path, "qwen2_vl")
    edit_json(directory / "preprocessor_config.json", patch_size=0)
    with pytest.raises(UnsupportedModel, match="refuses an image of 128x96 pixels: ZeroDivisionError"):
        LLMEngine(str(directory), **SMALL)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (20, 200)])
def test_an_image_without_tokens_is_an_invalid_one(height: int, width: int, tmp_path: Path) -> None:
    directory, image = make_generic_images(tmp_path, "lighton_ocr"), written_image("lighton_ocr")
    with LLMEngine(str(directory), **SMALL) as engine:
        with pytest.raises(InvalidImage, match=f"no token .* of {width}x{height} pixels, as for one smaller than a pa"):
            engine.generate(image, GREEDY, [picture(1, height, width)], use_tqdm=False)
        assert len(engine.generate(image, GREEDY, ONE, use_tqdm=False)[0].token_ids) == GREEDY.max_tokens


def test_a_processor_that_needs_torchvision_is_refused_and_the_text_of_its_model_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_generic_images(tmp_path, "lfm2_vl")
    with pytest.raises(UnsupportedModel, match=r"torchvision: Lfm2VlImageProcessor.*enable_multimodal=False serves"):
        LLMEngine(str(directory), **SMALL)
    plain = AutoModelForImageTextToText.from_pretrained(directory).eval()
    with LLMEngine(str(directory), **SMALL, enable_multimodal=False, num_speculative_tokens=0) as engine:
        prompt = [7, 8, 9, 10] * 8
        without = engine.model_runner.model.never_sampled
        wanted = transformers_answer(plain, {"input_ids": torch.tensor([prompt])}, without)
        assert_same(Recorded(engine, monkeypatch).answers([prompt])[0], wanted, 1e-4, without)


@pytest.mark.parametrize(
    ("file", "name", "kind", "message"),
    [
        ("processor_config.json", "processor_class", "AutoProcessor", "transformers has no processor 'Own'"),
        ("preprocessor_config.json", "image_processor_type", "AutoImageProcessor", "code of the checkpoint, which is"),
    ],
)
def test_code_of_a_processor_is_not_run(file: str, name: str, kind: str, message: str, tmp_path: Path) -> None:
    directory, ran = make_generic_images(tmp_path, "idefics3"), tmp_path / "ran"
    (directory / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    edit_json(directory / file, **{name: "Own", "auto_map": {kind: "own.Own"}})
    with pytest.raises(UnsupportedModel, match=message):
        LLMEngine(str(directory), **SMALL)
    assert not ran.exists()


def test_attention_to_later_tokens_of_an_image_is_refused_by_layer(tmp_path: Path) -> None:
    directory = make_generic_images(tmp_path, "gemma3")
    with pytest.raises(UnsupportedModel, match=r"layer 0: attention to later tokens, such as those of an image,"):
        LLMEngine(str(directory), **SMALL)


@pytest.mark.parametrize(
    ("family", "text", "message"),
    [
        ("mllama", {"cross_attention_layers": [1]}, "layer 1: cross-attention is not supported"),
        ("unlimited_ocr", {"sliding_window": 8}, "layer 0: layers of type 'reference_sliding_attention'"),
    ],
)
def test_layers_that_no_attention_over_tokens_computes_are_refused(
    family: str, text: dict[str, Any], message: str, tmp_path: Path
) -> None:
    directory = make_generic_text(tmp_path, "llama")  # its weights are not looked at
    AutoConfig.for_model(family, text_config={"num_hidden_layers": 2, **text}).save_pretrained(directory)
    with pytest.raises(UnsupportedModel, match=message):
        LLMEngine(str(directory), **SMALL)


@pytest.mark.parametrize("family", ["idefics3", "glm_ocr", "lighton_ocr"])
async def test_a_job_with_an_image_of_a_decoder_process_is_a_turn_of_the_chat_template(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, image = make_generic_images(tmp_path, family), written_image(family)
    file = io.BytesIO()
    ONE[0].save(file, "PNG")
    rendered = f"<|im_start|>user\nWhat is {image} here?<|im_end|>\n<|im_start|>assistant\n"
    with LLMEngine(str(directory), **SMALL) as engine:
        wanted = engine.generate(rendered, GREEDY, ONE, use_tqdm=False)[0]
    async with AsyncEngine(LLMEngine(str(directory), **SMALL)) as backend:
        assert backend.image_transform is not None
        pool = DecoderPool(backend.image_transform, workers=1, timeout_s=60.0)
        await pool.start()
        prepared = await pool.prepare(file.getvalue())
        await pool.close()
        request = Request("job", prompt="What is <|image|> here?", images=(prepared,), sampling=GREEDY)
        threads = record_threads(backend._engine, monkeypatch)
        found = await backend.submit(request)
        assert await backend.fits(request)
    assert len(threads) == 1
    assert threads[0].startswith("nanovllm-images"), "beside the engine's steps"
    assert (found.token_ids, found.usage) == (wanted.token_ids, wanted.usage)


@pytest.mark.parametrize(("family", "declared"), [("idefics3", GENERIC), ("qwen3_5", GENERIC_WITH_STATES)])
async def test_what_the_backend_declares_it_does_with_images(
    family: str, declared: Capabilities, tmp_path: Path
) -> None:
    asked: dict[str, dict[str, Any]] = {"regex": {"regex": "(ab){2}c"}, "n": {"n": 2}, "scores": {"prompt_logprobs": 1}}
    async with AsyncEngine(LLMEngine(str(make_generic_images(tmp_path, family)), **SMALL)) as backend:
        assert backend.capabilities == replace(declared, context=SMALL["max_model_len"])
        assert backend.image_transform is not None
        images = (prepare_rgb(ONE[0], backend.image_transform),) * 2
        running = {
            name: backend.submit(
                Request(name, prompt="<|image|> or <|image|>", images=images, sampling=SamplingParams(**params))
            )
            for name, params in asked.items()
        }
        found = {name: await generation for name, generation in running.items()}
    assert found["regex"].text == "ababc"
    assert len(found["n"].outputs) == 2
    assert len(found["scores"].prompt_logprobs or ()) == found["scores"].usage.input_tokens


def test_an_image_that_the_processor_refuses_fails_its_request_alone(tmp_path: Path) -> None:
    directory, image = make_generic_images(tmp_path, "qwen2_vl"), written_image("qwen2_vl")
    with LLMEngine(str(directory), **SMALL) as engine:
        with pytest.raises(InvalidImage, match="refuses an image of 2000x2 pixels"):
            engine.generate(image, GREEDY, [picture(1, 2, 2000)], use_tqdm=False)
        assert len(engine.generate(image, GREEDY, ONE, use_tqdm=False)[0].token_ids) == GREEDY.max_tokens


async def test_a_job_whose_image_the_processor_refuses_fails_alone(tmp_path: Path) -> None:
    directory = make_generic_images(tmp_path, "qwen2_vl")
    async with AsyncEngine(LLMEngine(str(directory), **SMALL)) as backend:
        assert backend.image_transform is not None
        bad, good = (prepare_rgb(one, backend.image_transform) for one in (picture(1, 2, 2000), ONE[0]))
        jobs = [Request(name, prompt="<|image|>", images=(one,), sampling=GREEDY) for name, one in
                (("bad", bad), ("good", good))]  # fmt: skip
        refused, answered = [backend.submit(job) for job in jobs]
        with pytest.raises(InvalidImage, match="refuses an image of 2000x2 pixels"):
            await refused
        assert len((await answered).token_ids) == GREEDY.max_tokens


def test_without_images_its_text_is_served_alone(tmp_path: Path) -> None:
    with LLMEngine(str(make_generic_images(tmp_path, "internvl")), **SMALL, enable_multimodal=False) as engine:
        assert engine.processor is None
        assert len(engine.generate("hello", GREEDY, use_tqdm=False)[0].token_ids) == GREEDY.max_tokens


@pytest.mark.parametrize("options", [*({name: 1000} for name in IMAGE_BOUNDS), {"vision_model": "tower"}])
def test_options_of_other_encoders_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(options))}=.* brings towers of its own"):
        LLMEngine(str(make_generic_images(tmp_path, "internvl")), **SMALL, **options)


def test_a_context_without_room_for_an_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="max_model_len=64 does not hold an image, which has 34 tokens"):
        LLMEngine(str(make_generic_images(tmp_path, "idefics3")), **{**SMALL, "max_model_len": 64})
