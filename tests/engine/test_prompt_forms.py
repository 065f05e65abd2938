"""The forms of prompts that users of vLLM write: each is answered as what it says, or refused with what is accepted."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_llava
from PIL import Image

from nanovllm.engine.multimodal_llm_engine import MultiModalLLM
from nanovllm.errors import InvalidImage, InvalidInput, PlaceholderMismatch
from nanovllm.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
FIRST, SECOND = (np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8) for seed in (1, 2))
ONE, TWO = "Look: <|image|>", "Compare <|image|> and <|image|>"
USER = {"role": "user", "content": "What is it?"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MultiModalLLM]:
    directory = make_llava(tmp_path_factory.mktemp("llava"), size=64)
    with MultiModalLLM(str(directory), enable_multimodal=True, kv_cache_bytes=4 << 20) as engine:
        yield engine


def tokens(engine: MultiModalLLM, prompts: Any, images: Any = None) -> list[tuple[int, ...]]:
    return [output.token_ids for output in engine.generate(prompts, GREEDY, images=images, use_tqdm=False)]


def chat(engine: MultiModalLLM, messages: Any, images: Any = None) -> list[tuple[int, ...]]:
    return [output.token_ids for output in engine.chat(messages, GREEDY, False, images=images)]


def data_url(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def test_a_dict_with_a_prompt_is_that_prompt(engine: MultiModalLLM) -> None:
    expected = tokens(engine, "hello")
    assert tokens(engine, {"prompt": "hello"}) == tokens(engine, [{"prompt": "hello"}]) == expected
    assert tokens(engine, {"prompt": "hello", "multi_modal_data": None}) == expected
    assert tokens(engine, ["hello", {"prompt": "world"}]) == tokens(engine, ["hello", "world"])


@pytest.mark.parametrize("written", [list, tuple, np.array, torch.tensor], ids=["list", "tuple", "array", "tensor"])
def test_token_ids_are_one_prompt_in_a_dict_and_alone(engine: MultiModalLLM, written: Any) -> None:
    ids = engine.tokenizer.encode("hello world")
    expected = tokens(engine, [ids])
    assert tokens(engine, written(ids)) == tokens(engine, [written(ids)]) == expected
    assert tokens(engine, {"prompt_token_ids": written(ids)}) == expected
    assert tokens(engine, {"prompt_token_ids": written(ids), "prompt": "what they came from"}) == expected
    assert tokens(engine, [ids, "hello"]) == expected + tokens(engine, "hello")


@pytest.mark.parametrize("data", [lambda *pair: list(pair), lambda *pair: tuple(map(Image.fromarray, pair))])
def test_images_come_inside_a_dict(engine: MultiModalLLM, data: Any) -> None:
    expected = tokens(engine, TWO, [[FIRST, SECOND]])
    prompt = {"prompt": TWO, "multi_modal_data": {"image": data(FIRST, SECOND)}}
    assert tokens(engine, prompt) == tokens(engine, [prompt]) == expected
    one = {"prompt": ONE, "multi_modal_data": {"image": FIRST}}
    assert tokens(engine, [one, prompt, "no image"]) == [
        *tokens(engine, ONE, FIRST),
        *expected,
        *tokens(engine, "no image"),
    ]
    ids = [5, engine.model_runner.image_token_id]
    assert tokens(engine, {"prompt_token_ids": ids, "multi_modal_data": {"image": FIRST}}) == tokens(engine, ids, FIRST)
    assert tokens(engine, [one, {"prompt": ONE}], [None, [SECOND]]) == tokens(engine, [ONE, ONE], [[FIRST], [SECOND]])


def test_add_request_takes_the_same_dicts(engine: MultiModalLLM) -> None:
    name = engine.add_request({"prompt": ONE, "multi_modal_data": {"image": FIRST}}, GREEDY)
    outputs = {}
    while engine.has_unfinished():
        outputs |= {step.request_id: step.finished for step in engine.step() if step.finished}
    assert [outputs[name].token_ids] == tokens(engine, ONE, FIRST)


@pytest.mark.parametrize(
    "prompts",
    [
        7,
        None,
        b"hello",
        {"hello", "world"},
        [None],
        ["hello", 7],
        [7, "hello"],
        [1.5],
        [["hello", "world"]],
        [[[1]]],
        {},
        {"text": "hello"},
        {"prompt": 7},
        {"prompt": ["hello"]},
        {"prompt_token_ids": "hello"},
        {"prompt_token_ids": ["hello"]},
        {"prompt": "hello", "prompt_embeds": np.zeros((1, 2))},
        {"prompt": "hello", "mm_processor_kwargs": {"num_crops": 4}},
        USER,
        ["hello", USER],
        FIRST,
    ],
    ids=repr,
)
def test_what_is_no_prompt_is_refused_with_what_is(engine: MultiModalLLM, prompts: Any) -> None:
    with pytest.raises(InvalidInput, match=r"a prompt is a string, a list of token ids, .*'prompt_token_ids': list"):
        tokens(engine, prompts)
    assert not engine.has_unfinished()


def test_a_dict_that_is_no_prompt_is_named_by_its_fields(engine: MultiModalLLM) -> None:
    with pytest.raises(InvalidInput, match=r"fields that are not supported \(text\)"):
        tokens(engine, {"text": "hello"})
    with pytest.raises(InvalidInput, match=r"not \{'prompt': int\}$"):
        tokens(engine, {"prompt": 7})


@pytest.mark.parametrize("data", [{"video": FIRST}, {"image": FIRST, "audio": b"x"}, FIRST, "cat.jpg"])
def test_other_data_than_images_is_refused(engine: MultiModalLLM, data: Any) -> None:
    with pytest.raises(InvalidInput, match=r"multi_modal_data is \{'image': image\}"):
        tokens(engine, {"prompt": ONE, "multi_modal_data": data})


def test_images_inside_a_prompt_and_beside_it_are_refused(engine: MultiModalLLM) -> None:
    with pytest.raises(InvalidInput, match="give no images= beside them"):
        tokens(engine, {"prompt": ONE, "multi_modal_data": {"image": FIRST}}, [SECOND])
    with pytest.raises(PlaceholderMismatch, match=r"1 .* placeholder for 2 images"):
        tokens(engine, {"prompt": ONE, "multi_modal_data": {"image": [FIRST, SECOND]}})
    with pytest.raises(InvalidInput, match=r"images=\[\[\], \[image\]\], not \[ndarray\]"):
        tokens(engine, [{"prompt": ONE, "multi_modal_data": {"image": FIRST}}, ONE], [SECOND])
    assert not engine.has_unfinished()


def test_chat_answers_one_conversation_or_many(engine: MultiModalLLM) -> None:
    expected = tokens(engine, [[USER]])
    assert chat(engine, [USER]) == chat(engine, [[USER]]) == tokens(engine, [USER]) == expected
    system = {"role": "system", "content": "Be brief."}
    assert chat(engine, [[system, USER], [USER]]) == tokens(engine, [[system, USER]]) + expected
    assert chat(engine, []) == []


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": FIRST},
        {"type": "image", "image": Image.fromarray(FIRST)},
        {"type": "image_pil", "image_pil": Image.fromarray(FIRST)},
        {"type": "image_url", "image_url": {"url": data_url(FIRST)}},
        {"type": "image_url", "image_url": {"url": data_url(FIRST), "detail": "auto"}},
        {"type": "image_url", "image_url": data_url(FIRST)},
    ],
    ids=["array", "image", "pil", "url", "url with detail", "url alone"],
)
def test_a_message_may_hold_its_image(engine: MultiModalLLM, part: dict[str, Any]) -> None:
    def conversation(*parts: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, *parts]}]

    place = {"type": "image"}
    assert chat(engine, conversation(part)) == chat(engine, conversation(place), FIRST)
    assert tokens(engine, conversation(part)) == chat(engine, conversation(place), [[FIRST]])
    both = chat(engine, conversation(place, place), [[SECOND, FIRST]])
    assert chat(engine, conversation(place, part), [SECOND]) == both
    assert both != chat(engine, conversation(place, place), [[FIRST, SECOND]])
    with pytest.raises(PlaceholderMismatch, match="1 image part without an image for 0 images"):
        chat(engine, conversation(place, part))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://example.com/cat.jpg"}},
        {"type": "image", "image": "cat.jpg"},
        {"type": "image", "image": Path("cat.jpg")},
        {"type": "image", "url": "file:///etc/passwd"},
    ],
)
def test_a_path_or_url_in_a_message_is_the_place_of_an_image_and_is_not_opened(
    engine: MultiModalLLM, part: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(SECOND).save("cat.jpg")
    conversation = [{"role": "user", "content": [part]}]
    expected = chat(engine, [{"role": "user", "content": [{"type": "image"}]}], FIRST)
    assert chat(engine, conversation, FIRST) == expected
    with pytest.raises(InvalidInput, match=r"path or URL, which is not opened: give the image itself"):
        chat(engine, conversation)


def test_a_tensor_is_an_image_wherever_an_array_is(engine: MultiModalLLM) -> None:
    expected, tensor = tokens(engine, ONE, FIRST), torch.tensor(FIRST)
    for images in (tensor, [tensor], [[tensor]]):
        assert tokens(engine, ONE, images) == expected
    assert tokens(engine, {"prompt": ONE, "multi_modal_data": {"image": tensor}}) == expected
    beside = chat(engine, [{"role": "user", "content": [{"type": "image"}]}], FIRST)
    assert chat(engine, [{"role": "user", "content": [{"type": "image", "image": tensor}]}]) == beside
    with pytest.raises(InvalidImage, match=r"channels come last"):
        tokens(engine, ONE, tensor.permute(2, 0, 1))


@pytest.mark.parametrize(("held", "shape"), [([FIRST], "[ndarray]"), ((1, 2), "[int, int]"), ({1, 2}, "set")])
def test_what_is_no_image_in_a_message_is_named_by_its_shape(engine: MultiModalLLM, held: Any, shape: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(f"a message holds an image as {shape}: there an image is a PIL")):
        chat(engine, [{"role": "user", "content": [{"type": "image", "image": held}]}])


@pytest.mark.parametrize("messages", ["hello", 7, ["hello"], USER, [USER, "hello"], [[USER], "hello"], [7]], ids=repr)
def test_what_is_no_conversation_is_refused_with_what_is(engine: MultiModalLLM, messages: Any) -> None:
    with pytest.raises(InvalidInput, match=r"chat takes a list of messages|messages\[1\] is not an object"):
        chat(engine, messages)
    assert not engine.has_unfinished()


def test_a_data_url_that_is_no_base64_is_refused(engine: MultiModalLLM) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,#"}}
    with pytest.raises(InvalidInput, match="not valid base64"):
        chat(engine, [{"role": "user", "content": [part]}])


@pytest.mark.parametrize("params", [{"max_tokens": 3}, [{"max_tokens": 3}], 7, [GREEDY, None]])
def test_other_sampling_parameters_are_refused_with_what_is_accepted(engine: MultiModalLLM, params: Any) -> None:
    with pytest.raises(InvalidInput, match="sampling_params is a SamplingParams, or a list with one a prompt"):
        engine.generate(["hello"], params, use_tqdm=False)
    with pytest.raises(InvalidInput, match="sampling_params is a SamplingParams"):
        engine.add_request("hello", params)
    assert not engine.has_unfinished()
