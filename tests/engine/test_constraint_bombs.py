"""Constraints that cost too much end their own request, and hold up nothing else."""

from __future__ import annotations

import asyncio
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.engine.backends.base import Generation, Request
from nanovllm.engine.backends.native import AsyncEngine
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sampling import grammar_compiler, structured_output
from nanovllm.engine.sampling.grammar_compiler import GrammarCompiler
from nanovllm.engine.sampling.json_schema import enforceable
from nanovllm.errors import EngineDead, UnsupportedConstraint
from nanovllm.sampling_params import Constraint, SamplingParams

PROMPT = "Extract the fields as JSON:"
GOOD = SamplingParams(temperature=0.0, max_tokens=60, json_schema={"enum": ["invoice", "receipt"]})
AMBIGUOUS = 'start: s\ns: s s s | s s | "a" |'


def bomb(number: int = 0) -> dict[str, Any]:
    """A schema of 1 kB whose patterns' intersection has no end."""
    return {"type": "string", "allOf": [{"pattern": f"a.{{{length + number}}}b"} for length in range(1, 24)]}


@pytest.fixture
def compiler(engine: LLMEngine) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(engine.tokenizer, engine.input_processor._vocab_size, [2], cpu_s=1.0)
    yield compiler
    compiler.close()


def schema(value: Any) -> Constraint:
    return Constraint("json_schema", json.dumps(value))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "constraint",
    [
        schema(bomb()),
        schema({"properties": {"x": {"allOf": [{"pattern": f".*a.{{{i}}}b.*"} for i in range(1, 40)]}}}),
        schema({"type": "array", "items": bomb(3)}),
    ],
)  # fmt: skip
def test_a_compilation_without_end_is_refused_and_takes_nothing_from_this_process(
    compiler: GrammarCompiler, constraint: Constraint
) -> None:
    compiler.matcher(Constraint("choice", '["a"]'))
    gc.collect()
    before = resident_bytes()
    with pytest.raises(UnsupportedConstraint, match="json_schema: compiling it takes more than the"):
        compiler.matcher(constraint)
    assert resident_bytes() - before < 32 << 20


def test_what_a_compilation_takes_in_memory_is_bounded(engine: LLMEngine) -> None:
    fields = {f"p{i}": {"type": "string", "maxLength": 50 + i} for i in range(2_000)}
    large = schema({"type": "object", "properties": fields, "required": list(fields)})
    compiler = GrammarCompiler(engine.tokenizer, engine.input_processor._vocab_size, [2], memory_bytes=4 << 20)
    try:
        with pytest.raises(UnsupportedConstraint, match="compiling it takes more than the 4194304 bytes allowed"):
            compiler.matcher(large)
        compiler.matcher(Constraint("choice", '["a"]'))
    finally:
        compiler.close()


def test_the_compiled_grammars_are_bounded_in_bytes(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_COMPILED_BYTES", 1 << 20)
    texts = [json.dumps(["x" * 20_000, str(number)]) for number in range(40)]
    kept = {text: compiler.compile(Constraint("choice", text)) for text in texts}
    assert all(compiled.result() for compiled in kept.values())
    again = [text for text in texts if compiler.compile(Constraint("choice", text)) is kept[text]]
    assert len(again) < 20


def test_a_process_that_is_killed_is_replaced_and_the_constraint_compiled(compiler: GrammarCompiler) -> None:
    compiler.matcher(Constraint("choice", '["a"]'))
    process = compiler._quick._process
    assert process is not None
    process.kill()
    process.wait()
    assert compiler.matcher(Constraint("choice", '["b"]')).failure is None


async def test_bombs_do_not_hold_up_an_innocent_constraint_nor_the_end(text: Path) -> None:
    async def end_of(generation: Generation) -> object:
        return await generation

    async with AsyncEngine(LLMEngine(str(text), kv_cache_bytes=4 << 20)) as engine:
        params = [SamplingParams(json_schema=bomb(number)) for number in range(6)]
        bombs = [
            asyncio.create_task(end_of(engine.submit(Request(str(id(one)), PROMPT, sampling=one)))) for one in params
        ]
        good = engine.submit(Request("good", PROMPT, sampling=GOOD))
        assert (await good).finish_reason == "stop"
        # Each may use five seconds of the processor, one after another.
        assert not all(task.done() for task in bombs)
    # The engine is closed, and none of them is waited for.
    outcomes = await asyncio.wait_for(asyncio.gather(*bombs, return_exceptions=True), 30)
    assert {type(outcome) for outcome in outcomes} <= {UnsupportedConstraint, EngineDead}


async def test_an_ambiguous_grammar_ends_alone(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured_output, "MATCHER_CPU_S", 0.05)
    monkeypatch.setattr(structured_output, "MATCHER_CPU_S_PER_STEP", 0.0)
    monkeypatch.setattr(structured_output._Account, "left_s", 0.05)
    async with AsyncEngine(LLMEngine(str(text), kv_cache_bytes=4 << 20, forced_tokens=False)) as engine:
        ends = {engine._engine.tokenizer.convert_tokens_to_ids("a"): 100.0}
        costly = SamplingParams(temperature=0.0, max_tokens=400, grammar=AMBIGUOUS, logit_bias=ends)
        free = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
        lost = engine.submit(Request("lost", PROMPT, sampling=costly))
        neighbour = engine.submit(Request("free", PROMPT, sampling=free))
        with pytest.raises(UnsupportedConstraint, match="ambiguous"):
            await lost
        assert len((await neighbour).token_ids) == 60
        assert engine.death is None


@pytest.mark.parametrize("regex", ["(?:a?){50}a{50}", "(a*a*a*)*b", "(a|aa|aaa){20}"])
def test_an_expression_with_many_ways_to_match_ends(engine: LLMEngine, regex: str) -> None:
    output = engine.generate(PROMPT, SamplingParams(regex=regex, seed=0, max_tokens=120), use_tqdm=False)[0]
    assert set(output.text) <= {"a", "b"}  # Python's own re would not end


@pytest.mark.parametrize("pattern", ["^(?:a?){50}a{50}$", "^(a*a*a*)*b$", "^(a|aa)*b$"])
def test_a_pattern_with_many_ways_to_match_a_property_holds_nothing_up(pattern: str) -> None:
    schema = {"properties": {"a" * 49: {"type": "integer"}}, "patternProperties": {pattern: {"type": "string"}}}
    assert enforceable(schema) == schema  # Python's own re would not end


@pytest.mark.parametrize(
    "oddity",
    [
        {"format": []},
        {"allOf": 5, "type": "string"},
        {"properties": 7},
        {"required": "a"},
        {"items": [[]]},
        {"minProperties": "x", "required": {}},
        {"patternProperties": {"(": {}}},
        {"enum": {}},
        {"$ref": "#/nowhere"},
        {"$ref": 4},
        {"type": ["string", 4]},
        {"oneOf": [{"required": [None]}, {"required": [[]]}]},
        {"dependentSchemas": {"a": [1]}},
        {"pattern": 4, "type": "string"},
        {"maxLength": -1, "type": "string"},
        {"maxLength": 10**30, "type": "string"},
    ],
    ids=json.dumps,
)
def test_an_odd_schema_is_refused_or_followed(compiler: GrammarCompiler, oddity: dict[str, Any]) -> None:
    try:
        compiler.matcher(schema(oddity))
    except UnsupportedConstraint as error:  # any other exception fails the test
        reason = str(error)
    else:
        return
    assert reason.startswith("json_schema: ")
    assert reason.count("json_schema: ") == 1
