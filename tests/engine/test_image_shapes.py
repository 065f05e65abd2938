"""The shapes in which the images of one prompt, and of many, may be given."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_llava, make_qwen3
from engine_parts import drain
from PIL import Image

from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.native import AsyncEngine
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.multimodal_llm_engine import MultiModalLLM, MultiModalLLMEngine
from nanovllm.errors import InvalidImage, InvalidInput, PlaceholderMismatch
from nanovllm.sampling_params import SamplingParams
from nanovllm.vision.processor import VisionProcessor

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
SMALL = {"kv_cache_bytes": 4 << 20}
FIRST, SECOND = (
    np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8) for seed in (1, 2)
)  # [H, W, 3]
ONE, TWO = "Look: <|image|>", "Compare <|image|> and <|image|>"
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, {"type": "image"}]}]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MultiModalLLM]:
    directory = make_llava(tmp_path_factory.mktemp("llava"), size=64)
    with MultiModalLLMEngine(str(directory), enable_multimodal=True, **SMALL) as engine:
        yield engine


def tokens(engine: LLMEngine, prompts: Any, images: Any) -> list[tuple[int, ...]]:
    return [output.token_ids for output in engine.generate(prompts, GREEDY, images=images, use_tqdm=False)]


def test_the_guides_two_names_are_one_engine() -> None:
    assert MultiModalLLMEngine is MultiModalLLM


@pytest.mark.parametrize(
    "give",
    [
        lambda first, second: [[first, second]],
        lambda first, second: [first, second],
        lambda first, second: (first, second),
        lambda first, second: ((first, second),),
        lambda first, second: iter([first, second]),
        lambda first, second: (one for one in [[first, second]]),
        lambda first, second: [Image.fromarray(first), second],
    ],
    ids=["nested", "flat", "tuple", "tuples", "iterator", "generator of lists", "mixed types"],
)
@pytest.mark.parametrize("prompts", [TWO, [TWO], (TWO,)], ids=["bare", "list", "tuple"])
def test_the_images_of_one_prompt_may_be_flat(engine: MultiModalLLM, prompts: Any, give: Callable[..., Any]) -> None:
    assert tokens(engine, prompts, give(FIRST, SECOND)) == tokens(engine, [TWO], [[FIRST, SECOND]])
    assert tokens(engine, [TWO], [[FIRST, SECOND]]) != tokens(engine, [TWO], [[SECOND, FIRST]])


@pytest.mark.parametrize("prompts", [ONE, [ONE], MESSAGES, [MESSAGES]], ids=["bare", "list", "messages", "in a list"])
@pytest.mark.parametrize(
    "kind", ["array", "image", "path", "text", "bytes", "bytearray", "view", "file", "buffer", "prepared"]
)
def test_one_image_of_one_prompt_may_stand_alone(
    engine: MultiModalLLM, tmp_path: Path, prompts: Any, kind: str
) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(FIRST).save(file)
    assert engine.processor is not None
    image = {
        "array": FIRST,
        "image": Image.fromarray(FIRST),
        "path": file,
        "text": str(file),
        "bytes": file.read_bytes(),
        "bytearray": bytearray(file.read_bytes()),
        "view": memoryview(file.read_bytes()),
        "file": file.open("rb"),
        "buffer": io.BytesIO(file.read_bytes()),
        "prepared": engine.processor.prepare(FIRST),
    }[kind]
    expected = tokens(engine, prompts, [[FIRST]])
    assert tokens(engine, prompts, image) == tokens(engine, prompts, [image]) == expected


def test_token_ids_may_stand_without_a_list_too(engine: MultiModalLLM) -> None:
    ids = [5, 6, engine.model_runner.image_token_id]
    assert tokens(engine, ids, FIRST) == tokens(engine, [ids], [[FIRST]]) == tokens(engine, np.array(ids), FIRST)


def test_nothing_means_no_images(engine: MultiModalLLM) -> None:
    expected = tokens(engine, ["hello"], None)
    for images in ([], (), [[]], [None], [()]):
        assert tokens(engine, ["hello"], images) == expected
    assert tokens(engine, ["hello", ONE], [None, [FIRST]]) == expected + tokens(engine, ONE, FIRST)
    assert tokens(engine, [], []) == tokens(engine, [], None) == []


@pytest.mark.parametrize(
    ("prompts", "images", "wanted", "given"),
    [
        ([ONE, ONE], [FIRST, SECOND], "[[image], [image]]", "[ndarray, ndarray]"),
        ([ONE, TWO], [FIRST, SECOND, FIRST], "[[image], [image, image]]", "[ndarray, ndarray, ndarray]"),
        ([ONE, "hello"], FIRST, "[[image], []]", "[ndarray]"),
        ([ONE, TWO], "cat.jpg", "[[image], [image, image]]", "[str]"),
        ([ONE, ONE], [[FIRST], SECOND], "[[image], [image]]", "[[ndarray], ndarray]"),
        ([ONE, ONE], [[FIRST]], "[[image], [image]]", "[[ndarray]]"),
        ([ONE], [[[FIRST]]], "[[image]]", "[[[ndarray]]]"),
        ([TWO], [[FIRST], [SECOND]], "[[image, image]]", "[[ndarray], [ndarray]]"),
        (TWO, [[FIRST], SECOND], "[[image, image]]", "[[ndarray], ndarray]"),
        (ONE, {"image": FIRST}, "[[image]]", "dict"),
        (ONE, 7, "[[image]]", "int"),
        (ONE, [7], "[[image]]", "[int]"),
        (MESSAGES, [[[FIRST]]], "[[image]]", "[[[ndarray]]]"),
        ([ONE] * 6, [FIRST] * 6, "[[image], [image], [image], [image], …]", "[ndarray, ndarray, ndarray, ndarray, …]"),
    ],
)
def test_any_other_shape_is_refused_with_the_right_one(
    engine: MultiModalLLM, prompts: Any, images: Any, wanted: str, given: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        tokens(engine, prompts, images)
    assert str(caught.value).endswith(f"images={wanted}, not {given}")
    assert not engine.has_unfinished()


def test_a_stack_of_images_is_refused_with_the_list_to_write(engine: MultiModalLLM) -> None:
    with pytest.raises(InvalidImage, match=r"list\(array\)"):
        tokens(engine, ONE, np.stack([FIRST]))


def test_a_wrong_number_of_images_names_both(engine: MultiModalLLM) -> None:
    with pytest.raises(PlaceholderMismatch, match=r"2 .* placeholders for 3 images"):
        tokens(engine, [TWO], [FIRST, SECOND, FIRST])
    with pytest.raises(PlaceholderMismatch, match=r"2 .* placeholders for 1 image$"):
        tokens(engine, TWO, FIRST)


def test_add_request_takes_the_same_shapes(engine: MultiModalLLM, tmp_path: Path) -> None:
    Image.fromarray(FIRST).save(tmp_path / "a.png")
    (expected,) = tokens(engine, ONE, FIRST)
    for images in (FIRST, [FIRST], (FIRST,), iter([FIRST]), str(tmp_path / "a.png")):
        name = engine.add_request(ONE, GREEDY, images)
        assert drain(engine)[name].token_ids == expected
    for images in ([[FIRST]], 7, {"image": FIRST}):
        with pytest.raises(InvalidInput, match=r"images=\[image\], not"):
            engine.add_request(ONE, GREEDY, images)
    assert not engine.has_unfinished()


def test_the_processor_takes_the_same_shapes(engine: MultiModalLLM) -> None:
    assert engine.processor is not None
    processor = VisionProcessor(engine.processor.encoder)
    features, num_tokens = processor.process_images(FIRST)
    assert features.shape[0] == num_tokens == 4
    assert processor.process_images([FIRST])[0].equal(features)
    assert processor.replace_image_placeholders(ONE, FIRST) == processor.replace_image_placeholders(ONE, [FIRST])
    with pytest.raises(InvalidInput, match=r"images=\[image\], not \[\[ndarray\]\]"):
        processor.replace_image_placeholders(ONE, [[FIRST]])  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match=r"images=\[image, …\], not int"):
        processor.process_images(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("images", [FIRST, ("cat.jpg",), [FIRST], None])
def test_a_request_with_images_that_are_not_prepared_is_refused_before_the_engine_sees_it(images: Any) -> None:
    with pytest.raises(InvalidInput, match=r"images=\(prepare_image\("):
        Request("r", prompt=ONE, images=images)


async def test_a_request_takes_its_images_as_a_list_or_a_tuple(tmp_path: Path) -> None:
    async with AsyncEngine(LLMEngine(str(make_llava(tmp_path, size=64)), **SMALL)) as engine:
        assert engine._engine.processor is not None
        image = engine._engine.processor.prepare(FIRST)
        with pytest.raises(InvalidInput):
            Request("bare", prompt=ONE, images=image)  # type: ignore[arg-type]
        listed = await engine.submit(Request("list", prompt=ONE, images=[image], sampling=GREEDY))  # type: ignore[arg-type]
        assert (
            listed.token_ids
            == (await engine.submit(Request("r", prompt=ONE, images=(image,), sampling=GREEDY))).token_ids
        )
        assert engine.death is None


def test_a_text_engine_has_the_vision_figures_at_zero(engine: MultiModalLLM, tmp_path: Path) -> None:
    with MultiModalLLM(str(make_qwen3(tmp_path)), **SMALL) as text:
        stats = text.model_runner.get_vision_stats()
        assert set(stats) == set(engine.model_runner.get_vision_stats())
        assert not any(stats.values())
        assert f"{stats['vision_cache_size']}" == "0"
        assert text.get_multimodal_stats() == {"multimodal_enabled": False}
        with pytest.raises(InvalidInput, match="no vision model"):
            text.generate("hello", GREEDY, images=FIRST, use_tqdm=False)
