"""Tokens that the model does not have: named by a checkpoint, written by its tokenizer, or asked for by a request."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_qwen3
from engine_parts import greedy
from transformers import AutoTokenizer

from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.native import AsyncEngine
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import InvalidInput, PromptTooLong
from nanovllm.sampling_params import SamplingParams

BEYOND = "<|beyond|>"
TEMPLATE = "{% for message in messages %}{{ message['content'] + '" + BEYOND + "' }}{% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer has a token more than its model."""
    directory = make_qwen3(tmp_path_factory.mktemp("vocabulary"))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([BEYOND])
    tokenizer.save_pretrained(directory)
    assert tokenizer.convert_tokens_to_ids(BEYOND) == vocab_size(directory)
    return directory


def vocab_size(directory: Path) -> int:
    size: int = json.loads((directory / "config.json").read_text())["vocab_size"]
    return size


def make_engine(directory: Path, **options: Any) -> LLMEngine:
    return LLMEngine(str(directory), kv_cache_bytes=4 << 20, **options)


GENERATION = "generation_config.json"


@pytest.mark.parametrize(
    ("file", "named", "kept"),
    [
        *(
            (file, named, kept)
            for file in (GENERATION, "config.json")
            for named, kept in ((2, {2}), ([3, 9999], {2, 3}), (9999, {2}), ([-1, 3], {2, 3}), (-9999, {2}))
        ),
        (GENERATION, "3", {2}),
        (GENERATION, [[3]], {2}),
        (GENERATION, True, {2}),
        ("config.json", None, {2}),
    ],
    ids=str,
)
def test_end_tokens_that_the_model_does_not_have_are_ignored_with_a_warning(
    text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, named: Any, kept: set[int]
) -> None:
    for source in text.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / GENERATION).unlink(missing_ok=True)
    fields = json.loads((tmp_path / file).read_text()) if file == "config.json" else {}
    (tmp_path / file).write_text(json.dumps({**fields, "eos_token_id": named}))
    caplog.set_level(logging.WARNING, "nanovllm")

    with make_engine(tmp_path) as engine:
        for options in ({"min_tokens": 4}, {"min_tokens": 4, "stop_token_ids": [3]}, {"temperature": 1.0, "seed": 1}):
            params = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **options})
            engine.generate("hello", params, use_tqdm=False)
        assert engine.input_processor._eos_token_ids == kept

    warnings = [record.getMessage() for record in caplog.records if record.name == "nanovllm.checkpoints.checkpoint"]
    if named == 2 or named is None:
        assert warnings == []
    else:
        assert [file in warning and repr(named) in warning for warning in warnings] == [True]


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (f"hello {BEYOND}", {}),
        ([{"role": "user", "content": "hello"}], {}),  # the template writes the token
        ([1, 10**6], {}),
        ([1, -1], {}),
        ("hello", {"bad_words": [BEYOND]}),
        ("hello", {"bad_words": [f"hello{BEYOND}"]}),
        ("hello", {"stop_token_ids": [383]}),
        ("hello", {"stop_token_ids": [-1], "min_tokens": 2}),
        ("hello", {"logit_bias": {383: 1.0}}),
        ("hello", {"logit_bias": {-1: 1.0}}),
        ("hello", {"choice": ["yes"]}),
    ],
    ids=str,
)
def test_a_request_that_names_a_token_beyond_the_vocabulary_is_refused(
    checkpoint: Path, prompt: Any, options: dict[str, Any]
) -> None:
    with make_engine(checkpoint) as engine:
        engine.input_processor.prompts._tokenizer.chat_template = TEMPLATE
        with pytest.raises(InvalidInput, match="vocab"):
            engine.add_request(prompt, SamplingParams(**options))
        assert not engine.has_unfinished()
        assert len(engine.generate("hello", greedy(4), use_tqdm=False)[0].token_ids) == 4


async def test_refused_requests_leave_the_engine_to_the_others(checkpoint: Path) -> None:
    llm = make_engine(checkpoint)
    llm.input_processor.prompts._tokenizer.chat_template = TEMPLATE
    bad: list[dict[str, Any]] = [
        {"prompt": "hello"},
        {"prompt": "hello", "raw_prompt": True, "sampling": SamplingParams(bad_words=(BEYOND,))},
        {"prompt": "hello", "raw_prompt": True, "sampling": SamplingParams(stop_token_ids=(383,), min_tokens=1)},
        {"prompt": "total " * 1_400_000},
        {"prompt": "total " * 1_400_000, "raw_prompt": True},
        {"messages": [{"role": "user", "content": "a" * 8_300_000}]},
        {"messages": [{"role": "user", "content": ""}] * 30_000},
    ]
    async with AsyncEngine(llm) as engine, asyncio.timeout(60):
        good = engine.submit(Request("good", "hello", raw_prompt=True, sampling=greedy(40)))
        for number, fields in enumerate(bad):
            with pytest.raises(InvalidInput):
                await engine.submit(Request(str(number), **fields))
        assert len((await good).token_ids) == 40
        assert engine.death is None


@pytest.mark.parametrize(
    "prompt",
    ["total " * 1_400_000, " " * 8_300_000, [5] * 8_300_000, [{"role": "user", "content": "the total " * 830_000}]],
    ids=["text", "white space", "tokens", "message"],
)
def test_a_prompt_of_millions_is_refused_before_it_is_encoded(
    checkpoint: Path, prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_engine(checkpoint) as engine:
        monkeypatch.setattr("nanovllm.engine.text.prompt_encoder._encode", lambda *_: pytest.fail("it was encoded"))
        for ask in (engine.add_request, lambda prompt: engine.generate([prompt], use_tqdm=False)):
            with pytest.raises(PromptTooLong, match=r"8[34]00000 (characters; at most 262144|tokens)"):
                ask(prompt)
        assert not engine.has_unfinished()
