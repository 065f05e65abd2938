"""Constrained outputs: always valid, refused when they cannot be, the same with and without forced tokens."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.native import AsyncEngine
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sampling.structured_output import TokenMasks
from nanovllm.errors import UnsupportedConstraint
from nanovllm.sampling_params import SamplingParams
from nanovllm.training import synthetic

PROMPT = "Extract the fields as JSON:"
SCHEMA = {
    "type": "object",
    "properties": {
        "vendor": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["invoice", "receipt"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["vendor", "kind", "count"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def unforced(text: Path) -> Iterator[LLMEngine]:
    with LLMEngine(str(text), kv_cache_bytes=4 << 20, forced_tokens=False) as engine:
        yield engine


def ask(engine: LLMEngine, **options: Any) -> Any:
    options = {"temperature": 0.0, "max_tokens": 200, **options}
    return engine.generate(PROMPT, SamplingParams(**options), use_tqdm=False)[0]


def is_valid(text: str) -> bool:
    value = json.loads(text)
    return (
        set(value) == {"vendor", "kind", "count"}
        and len(value["vendor"]) <= 8
        and value["kind"] in ("invoice", "receipt")
        and 0 <= value["count"] <= 99
    )


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 1}, {"temperature": 1.0, "top_k": 3, "seed": 2}])
def test_a_schema_holds_whatever_the_model_wants(engine: LLMEngine, options: dict[str, Any]) -> None:
    output = ask(engine, json_schema=SCHEMA, **options)

    assert output.finish_reason == "stop"
    assert is_valid(output.text)


@pytest.mark.parametrize("pattern", [r"[A-Z]{2}-[0-9]{4}", r"(yes|no), because .{1,20}\."])
def test_an_expression_matches_the_whole_text(engine: LLMEngine, pattern: str) -> None:
    output = ask(engine, regex=pattern)

    assert output.finish_reason == "stop"
    assert re.fullmatch(pattern, output.text)


def test_a_choice_is_one_of_the_choices(engine: LLMEngine) -> None:
    choices = ["a receipt", 'a "quoted" word', "two\nlines", "Übung"]
    seen = {ask(engine, choice=choices, temperature=3.0, seed=seed).text for seed in range(12)}

    assert seen <= set(choices)
    assert len(seen) > 1


def test_a_grammar_is_followed(engine: LLMEngine) -> None:
    output = ask(engine, grammar='start: "(" item ("," item)? ")"\nitem: /[0-9]{1,3}/')

    assert re.fullmatch(r"\([0-9]{1,3}(,[0-9]{1,3})?\)", output.text)


def test_forced_tokens_save_steps_and_change_nothing(engine: LLMEngine, unforced: LLMEngine) -> None:
    before = engine.stats().steps, unforced.stats().steps
    outputs = ask(engine, json_schema=SCHEMA), ask(unforced, json_schema=SCHEMA)
    steps = engine.stats().steps - before[0], unforced.stats().steps - before[1]

    assert outputs[0].text == outputs[1].text
    assert steps[0] < 0.7 * steps[1]


def test_a_text_that_is_whole_with_its_last_token_was_not_cut(engine: LLMEngine, unforced: LLMEngine) -> None:
    for one in (engine, unforced):
        length = len(ask(one, choice=["a receipt"]).token_ids)
        ends = [ask(one, choice=["a receipt"], max_tokens=length - less) for less in (0, 1)]
        assert [(end.text == "a receipt", end.finish_reason) for end in ends] == [(True, "stop"), (False, "length")]


def test_forced_tokens_stop_at_max_tokens_and_at_a_stop_string(engine: LLMEngine, unforced: LLMEngine) -> None:
    for options in ({"max_tokens": 5}, {"stop": ["kind"]}):
        forced, plain = (ask(one, json_schema=SCHEMA, **options) for one in (engine, unforced))
        assert (forced.text, forced.finish_reason) == (plain.text, plain.finish_reason)
    assert ask(engine, json_schema=SCHEMA, max_tokens=5).finish_reason == "length"
    engine.audit()


def test_a_constrained_request_leaves_its_neighbours_alone(engine: LLMEngine) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    alone = engine.generate(PROMPT, free, use_tqdm=False)[0]
    bound = SamplingParams(temperature=0.0, max_tokens=200, json_schema=SCHEMA)
    first, second, third = engine.generate([PROMPT] * 3, [bound, free, bound], use_tqdm=False)

    assert second.token_ids == alone.token_ids
    assert first.text == third.text == ask(engine, json_schema=SCHEMA).text


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.2, "top_p": 0.5, "min_p": 0.1, "seed": 1},
    {"repetition_penalty": 2.0, "presence_penalty": 1.0, "frequency_penalty": 1.0},
    {"logit_bias": dict.fromkeys(range(3, 40), 90.0)},
    {"bad_words": ["invoice", "v", '"']},
    {"min_tokens": 60},
    {"ignore_eos": True},
    {"logprobs": 2, "prompt_logprobs": 0},
    {"loop_tokens": 512, "skip_special_tokens": False},
    {"n": 3, "temperature": 1.5, "seed": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_a_schema_holds_under_every_option(engine: LLMEngine, options: dict[str, Any]) -> None:
    output = ask(engine, json_schema=SCHEMA, **options)

    assert all(one.finish_reason == "stop" and is_valid(one.text) for one in output.outputs)


def test_masks_are_computed_while_the_model_runs(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    filled, forwards = threading.Event(), []
    fill, forward = TokenMasks._fill, engine.model_runner.forward

    def filling(self: TokenMasks, rows: Any) -> Any:
        masks = fill(self, rows)
        filled.set()
        return masks

    def waiting(inputs: Any) -> Any:
        forwards.append(filled.wait(30.0))  # would never come if masks were computed before or after
        filled.clear()
        return forward(inputs)

    monkeypatch.setattr(TokenMasks, "_fill", filling)
    monkeypatch.setattr(engine.model_runner, "forward", waiting)
    output = ask(engine, json_schema=SCHEMA)

    assert is_valid(output.text)
    assert forwards == [True] * len(forwards) != []


def test_a_constraint_outweighs_bad_words_and_min_tokens(engine: LLMEngine) -> None:
    output = ask(engine, choice=["yes"], bad_words=["yes", "y"], min_tokens=50)

    assert (output.text, output.finish_reason) == ("yes", "stop")


# After the comma no rule can end, and so no token is allowed.
DEAD_END = 'start: "{" /[0-9]/ ("}" | "," endless "}")\nendless: endless "x"'


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n": 2, "temperature": 0.5, "seed": 1},
        {"min_tokens": 30, "max_tokens": 60},
        {"stop": ["}"], "include_stop_str_in_output": True},
        {"ignore_eos": True},
        {"logprobs": 1},
    ],
    ids=str,
)
def test_a_dead_end_is_an_error_and_no_whole_text(
    engine: LLMEngine, unforced: LLMEngine, options: dict[str, Any]
) -> None:
    comma = engine.tokenizer.convert_tokens_to_ids(",")
    for one in (engine, unforced):
        assert ask(one, grammar=DEAD_END, logit_bias={comma: -100.0}).text.startswith("{")
        with pytest.raises(UnsupportedConstraint, match="allows no token after the text so far"):
            ask(one, grammar=DEAD_END, logit_bias={comma: 100.0}, **options)
        assert not one.has_unfinished()
        one.audit()


async def test_a_dead_end_fails_its_own_request_alone(text: Path) -> None:
    async with AsyncEngine(LLMEngine(str(text), kv_cache_bytes=4 << 20)) as engine:
        comma = {engine._engine.tokenizer.convert_tokens_to_ids(","): 100.0}
        dead = SamplingParams(temperature=0.0, max_tokens=200, grammar=DEAD_END, logit_bias=comma)
        free = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
        neighbour, lost = (
            engine.submit(Request("n", PROMPT, sampling=free)),
            engine.submit(Request("d", PROMPT, sampling=dead)),
        )
        with pytest.raises(UnsupportedConstraint):
            await lost
        assert len((await neighbour).token_ids) == 40
        assert engine.death is None


def test_a_stop_inside_a_constraint_is_reported_as_a_cut(engine: LLMEngine, unforced: LLMEngine) -> None:
    quote = engine.tokenizer.convert_tokens_to_ids('"')
    cut: list[dict[str, Any]] = [
        {"json_schema": SCHEMA, "stop": ["kind"]},
        {"json_schema": SCHEMA, "stop": ["kind"], "include_stop_str_in_output": True},
        {"json_schema": SCHEMA, "stop": ["}"]},
        {"choice": ["yes.no"], "stop": [".no"]},
        {"choice": ["yes.no"], "stop": ["."]},
        {"regex": '[a-z]"[a-z]+', "stop_token_ids": [quote]},
        {"regex": '[a-z]"', "stop_token_ids": [quote]},  # the stop token is no part of the text
        {"grammar": 'start: "a" <[2]> "b"'},  # the end of the sequence as a part of the text
    ]
    whole: list[dict[str, Any]] = [
        {"json_schema": SCHEMA, "stop": ["}"], "include_stop_str_in_output": True},
        {"choice": ["yes", "yes, it is"], "stop": ["is"], "include_stop_str_in_output": True},
        {"choice": ["yes.no"], "stop": [".no"], "include_stop_str_in_output": True},
        {"choice": ["yes", "yes, it is"], "stop": ["maybe"]},
        {"regex": '[a-z]"', "stop_token_ids": [quote], "include_stop_str_in_output": True},
        {"regex": '[a-z]"?', "stop_token_ids": [quote]},
        {"regex": "(ab)*", "min_tokens": 20},
        {"grammar": 'start: "a" <[2]>?'},
    ]
    for one in (engine, unforced):
        assert [ask(one, **options).finish_reason for options in cut] == ["length"] * len(cut)
        assert [ask(one, **options).finish_reason for options in whole] == ["stop"] * len(whole)


def test_every_output_of_a_request_has_a_constraint_of_its_own(engine: LLMEngine) -> None:
    output = ask(engine, n=3, temperature=2.0, seed=3, json_schema=SCHEMA)

    assert all(is_valid(one.text) for one in output.outputs)
    assert len({one.text for one in output.outputs}) == 3


def test_with_logprobs_every_token_is_computed(engine: LLMEngine) -> None:
    output = ask(engine, json_schema=SCHEMA, logprobs=1)

    assert len(output.logprobs) == len(output.token_ids)
    assert output.text == ask(engine, json_schema=SCHEMA).text


@pytest.mark.parametrize(
    "options",
    [
        {"json_schema": {"type": "strong"}},
        {"json_schema": {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}},
        {"json_schema": {"not": {"type": "string"}}},
        {"json_schema": {"allOf": [{"const": 1}, {"const": 2}]}},
        {"json_schema": {"type": "integer", "minimum": 5, "maximum": 2}},
        {"json_schema": {"type": "object", "patternProperties": {"^a": {}, "^ab": {}}}},
        {"json_schema": {"type": "object", "required": ["a"], "properties": {"a": False}}},
        {"regex": "("},
        {"regex": r"(?=a)b"},
        {"grammar": "start: nothing"},
        {"grammar": "start: start"},
        {"regex": r"[^\s\S]"},
        {"regex": "[a&&b]x"},
        {"grammar": "start: X\nX: /b/ & /c/"},
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_refused(engine: LLMEngine, options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedConstraint, match=next(iter(options))):
        ask(engine, **options)
    assert not engine.has_unfinished()


async def test_the_async_engine_compiles_beside_its_steps_and_refuses_one_request_only(text: Path) -> None:
    async with AsyncEngine(LLMEngine(str(text), kv_cache_bytes=4 << 20)) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=200, json_schema=SCHEMA)
        good = engine.submit(Request("good", PROMPT, sampling=params))
        bad = engine.submit(Request("bad", PROMPT, sampling=SamplingParams(regex="(")))
        late = engine.submit(Request("late", PROMPT, sampling=params.model_copy(update={"json_schema": {"enum": [1]}})))
        late.abort()

        assert is_valid((await good).text)
        with pytest.raises(UnsupportedConstraint):
            await bad
        assert (await asyncio.wait_for(late, 30)).finish_reason == "abort"


def test_the_tiny_model_writes_foreign_names_in_fewer_steps_than_tokens() -> None:
    fields = {f"{name} of the receipt": {"type": "string", "maxLength": 20} for name in synthetic.FIELDS}
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    sample = synthetic.sample(0, seed=1, split="heldout", kind="json")
    texts, steps, tokens = [], [], []
    for forced in (True, False):
        with LLMEngine("tiny-receipts", forced_tokens=forced, num_speculative_tokens=0) as engine:
            params = SamplingParams(temperature=0.0, max_tokens=200, json_schema=schema)
            prompt = {"prompts": [sample.prompt], "images": [list(sample.images)]}
            output = engine.generate(**prompt, sampling_params=params, use_tqdm=False)[0]
            texts.append(output.text)
            steps.append(engine.stats().steps)
            tokens.append(len(output.token_ids))

    assert set(json.loads(texts[0])) == set(fields)
    assert texts[0] == texts[1]
    assert steps[0] <= 0.7 * tokens[0]
    assert steps[1] >= tokens[1]
