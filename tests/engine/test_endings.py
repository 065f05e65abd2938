"""An output ends at every end token that the checkpoint or its tokenizer names, and the ending is no text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_text
from sentencepiece_tokenizers import make_sentencepiece_tokenizer

from nanovllm.engine.diagnostics import describe
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ConfigurationError, UnsupportedModel
from nanovllm.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = make_sentencepiece_tokenizer()
    return make_text(tmp_path_factory.mktemp("text"), family="llama", tokenizer=tokenizer, num_layers=1)


def changed(directory: Path, target: Path, **files: dict[str, Any]) -> Path:
    """A copy whose JSON files have these fields."""
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    for name, fields in files.items():
        file = target / f"{name}.json"
        before = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps({**before, **fields}))
    return target


def load(directory: Path, **options: Any) -> LLMEngine:
    return LLMEngine(str(directory), kv_cache_bytes=2 << 20, **options)


def ends(engine: LLMEngine) -> set[int]:
    """The tokens after which an output ends, tried one by one."""
    found = set()
    for token in (2, 300, 310, 320, 330):
        params = SamplingParams(max_tokens=2, logit_bias={token: 100.0})
        output = engine.generate("What is", params, use_tqdm=False)[0]
        if len(output.token_ids) == 1:
            assert (output.finish_reason, output.text) == ("stop", "")
            found.add(token)
    return found


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config": {"eos_token_id": 300}, "generation_config": {"eos_token_id": [310, 320]}}, {2, 300, 310, 320}),
        ({"config": {"eos_token_id": [300, 310]}, "generation_config": {"eos_token_id": None}}, {2, 300, 310}),
        ({"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": None}}, {2}),
        (
            {
                "config": {"eos_token_id": None},
                "generation_config": {"eos_token_id": 330},
                "tokenizer_config": {"eos_token": "<|end|>"},
            },
            {330},
        ),
    ],
    ids=["config and generation", "several of the config", "tokenizer alone", "generation and another tokenizer's"],
)
def test_every_end_token_ends_an_output_and_none_is_text(
    directory: Path, tmp_path: Path, files: dict[str, dict[str, Any]], expected: set[int]
) -> None:
    with load(changed(directory, tmp_path, **files)) as engine:
        assert ends(engine) == expected


@pytest.mark.parametrize("named", [None, 9999, [-1]], ids=str)
def test_a_checkpoint_without_an_end_token_is_refused(tmp_path: Path, named: Any) -> None:
    tokenizer = make_sentencepiece_tokenizer("normalizer")
    tokenizer.eos_token = None
    directory = make_text(tmp_path, family="llama", tokenizer=tokenizer, num_layers=1)
    config = directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": named}))
    (directory / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(
        UnsupportedModel, match="names no token that ends a text: set eos_token_id in generation_config"
    ):
        load(directory)


def test_a_stop_token_is_text_only_where_that_is_asked_for(directory: Path) -> None:
    with load(directory) as engine:
        the = engine.tokenizer.convert_tokens_to_ids("▁the")
        options: dict[str, Any] = {"max_tokens": 3, "stop_token_ids": [the], "logit_bias": {the: 100.0}}
        for include, text in ((False, ""), (True, " the")):
            params = SamplingParams(**options, include_stop_str_in_output=include)
            output = engine.generate("What is", params, use_tqdm=False)[0]
            assert (output.text, output.token_ids, output.finish_reason) == (text, (the,), "stop")
        later = engine.generate("What is", SamplingParams(**options, min_tokens=1), use_tqdm=False)[0]
        assert (len(later.token_ids), later.token_ids[-1]) == (2, the)
        assert not later.text.endswith("the")
        params = SamplingParams(max_tokens=2, logit_bias={2: 100.0}, skip_special_tokens=False)
        assert engine.generate("What is", params, use_tqdm=False)[0].text == ""
        params = params.model_copy(update={"include_stop_str_in_output": True})
        assert engine.generate("What is", params, use_tqdm=False)[0].text == "</s>"


GENERATION = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 7}


def test_sampling_defaults_of_the_checkpoint_count_without_sampling_parameters(directory: Path, tmp_path: Path) -> None:
    model = changed(directory, tmp_path, generation_config=GENERATION)
    with load(model) as engine:
        own = engine.get_default_sampling_params()
        assert (own.temperature, own.top_k, own.top_p, own.max_tokens) == (0.6, 20, 0.95, 7)
        assert len(engine.generate([[5, 6]], use_tqdm=False)[0].token_ids) <= 7
        assert len(engine.generate([[5, 6]], SamplingParams(ignore_eos=True), use_tqdm=False)[0].token_ids) == 16
        told = {finding.subject: finding for finding in describe(engine)}["sampling defaults"]
        assert "temperature 0.6" in told.value
        assert "generation_config.json" in told.note
    with load(model, generation_config="vllm") as engine:
        assert engine.get_default_sampling_params() == SamplingParams()
        told = {finding.subject: finding for finding in describe(engine)}["sampling defaults"]
        assert "ignores what generation_config.json sets: temperature" in told.note
        assert told.value == "temperature 1.0"
        for_jobs = describe(engine, SamplingParams(temperature=0, max_tokens=9))
        told = {finding.subject: finding for finding in for_jobs}["sampling defaults"]
        assert told.value == "max_tokens 9, temperature 0.0, which is greedy"
    with load(directory) as engine:
        assert engine.get_default_sampling_params() == SamplingParams()


IGNORED = {"suppress_tokens": [421], "bad_words_ids": [[421]], "min_new_tokens": 3, "max_length": 4, "num_beams": 4}
WITHOUT_EFFECT = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "max_length": 20, "suppress_tokens": []}


def test_what_the_checkpoint_asks_for_in_vain_is_told_at_load(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for generation, option, told in (
        (IGNORED, "auto", True),
        (WITHOUT_EFFECT, "auto", False),
        (IGNORED, "vllm", False),
    ):
        caplog.clear()
        with load(changed(directory, tmp_path, generation_config=generation), generation_config=option) as engine:
            note = {finding.subject: finding for finding in describe(engine)}["sampling defaults"].note
        for name in generation:
            assert (name in note) == (name in caplog.text) == told


def test_sampling_defaults_that_no_engine_takes_are_an_error_with_a_way_out(directory: Path, tmp_path: Path) -> None:
    model = changed(directory, tmp_path, generation_config={"temperature": -1.0})
    with pytest.raises(ConfigurationError, match=r"generation_config\.json asks for .*generation_config='vllm'"):
        load(model)
    with pytest.raises(ConfigurationError, match="generation_config='hf' is neither"):
        load(model, generation_config="hf")
    load(model, generation_config="vllm").close()
