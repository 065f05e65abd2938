"""What llguidance gets instead of a schema means exactly what the schema means."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import jsonschema
import pytest

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sampling.json_schema import enforceable
from nanovllm.errors import UnsupportedConstraint
from nanovllm.sampling_params import MAX_SCHEMA_CHARS, SamplingParams

A, B, C = ({name: {"type": "integer"}} for name in "abc")
OBJECT = {"type": "object", "properties": {**A, **B, **C}}

REWRITTEN: dict[str, dict[str, Any]] = {
    "dependencies on names": {**OBJECT, "dependencies": {"a": ["b"], "c": ["a", "b"]}},
    "dependentRequired": {**OBJECT, "dependentRequired": {"a": ["c"]}},
    "dependentSchemas": {**OBJECT, "dependentSchemas": {"a": {"properties": {"b": {"minimum": 2}}}}},
    "a dependency that forbids": {**OBJECT, "dependencies": {"a": False}},
    "closed object": {**OBJECT, "additionalProperties": False, "dependencies": {"a": ["b"]}},
    "no type": {"dependencies": {"a": ["b"]}},
    "beside a choice": {**OBJECT, "anyOf": [{"required": ["a"]}, {"required": ["b"]}], "dependencies": {"a": ["c"]}},
    "beside allOf": {**OBJECT, "allOf": [{"required": ["c"]}], "dependencies": {"a": ["b"]}},
    "one property of two": {**OBJECT, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
    "one of three, no type": {"oneOf": [{"required": [name]} for name in "abc"]},
    "unknown format": {**OBJECT, "properties": {"a": {"type": "string", "format": "topic"}}},
    "inside": {"type": "object", "properties": {"a": {"items": {"dependencies": {"b": ["c"]}}}}},
    "a property called dependencies": {"properties": {"dependencies": {"type": "integer"}}, "required": ["a"]},
    "data that looks like a schema": {"enum": [{"a": 1, "format": "topic"}, {"a": 1, "dependencies": {"a": ["b"]}}]},
}
VALUES = [
    {name: value for name, value in zip("abc", values, strict=True) if value is not None}
    for values in product((None, 1, 2, "x", [{"b": 1}]), (None, 1, 2), (None, 1))
]
OTHERS = [1, "a", ["a"], None, {"a": 1, "format": "topic"}, {"dependencies": 3, "a": 1}, {"a": 1, "dependencies": "x"}]


@pytest.mark.parametrize("schema", list(REWRITTEN.values()), ids=list(REWRITTEN))
def test_the_rewritten_schema_takes_the_same_values(schema: dict[str, Any]) -> None:
    before, after = (jsonschema.Draft7Validator(one) for one in (schema, enforceable(schema)))
    if "dependentRequired" in schema or "dependentSchemas" in schema:
        before = jsonschema.Draft202012Validator(schema)
    verdicts = {json.dumps(value): (before.is_valid(value), after.is_valid(value)) for value in [*VALUES, *OTHERS]}
    assert {value: pair for value, pair in verdicts.items() if pair[0] != pair[1]} == {}
    assert len({pair[0] for pair in verdicts.values()}) == 2, "some values fit and some do not"


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"required": ["a"]}, {"required": ["a"]}]},
        {"oneOf": [{"required": ["a"]}, {"required": ["b", "c"]}]},
        {"dependencies": {str(number): ["a"] for number in range(5)}},
        {"dependencies": {"a": "b"}},
        {"type": "string", "format": "uri-reference"},
        {"type": "array", "uniqueItems": True},
        {"not": {"required": ["a"]}},
    ],
    ids=json.dumps,
)
def test_what_has_no_exact_form_stays_and_is_refused(engine: LLMEngine, schema: dict[str, Any]) -> None:
    assert enforceable(schema) == schema
    with pytest.raises(UnsupportedConstraint, match="json_schema: "):
        engine.add_request("JSON:", SamplingParams(json_schema=schema))


@pytest.mark.parametrize(
    ("schema", "is_enforced"),
    [
        ({"type": "object", "minProperties": 1}, True),
        ({"type": "object", "minProperties": 2}, False),
        (
            {"type": "object", "patternProperties": {"^a$": {}}, "additionalProperties": False, "minProperties": 2},
            False,
        ),
        ({**OBJECT, "required": ["a", "b", "c"], "minProperties": 4}, True),
        ({**OBJECT, "required": ["a", "b", "c"], "minProperties": 5}, False),
        ({**OBJECT, "required": ["a", "b", "c"], "additionalProperties": False, "minProperties": 3}, True),
        ({"type": "array", "items": {"type": "object", "minProperties": 2}}, False),
    ],
    ids=json.dumps,
)
def test_a_name_that_comes_twice_never_counts_as_two_properties(
    engine: LLMEngine, schema: dict[str, Any], is_enforced: bool
) -> None:
    if is_enforced:
        engine.abort(engine.add_request("JSON:", SamplingParams(json_schema=schema)))
        engine.step()
    else:
        with pytest.raises(UnsupportedConstraint, match="minProperties is "):
            engine.add_request("JSON:", SamplingParams(json_schema=schema))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["dependencies on names", "one property of two", "closed object", "dependentSchemas"])
def test_outputs_conform_to_the_schema_as_it_was_given(engine: LLMEngine, name: str, seed: int) -> None:
    schema = {**REWRITTEN[name], "additionalProperties": False}
    sampling = SamplingParams(json_schema=schema, temperature=1.5, seed=seed, max_tokens=400)
    output = engine.generate("JSON:", sampling, use_tqdm=False)[0]
    if output.finish_reason == "stop":
        jsonschema.validate(json.loads(output.text), schema)


def test_a_schema_nested_too_deeply_is_refused(engine: LLMEngine) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(400):
        schema = {"type": "array", "items": schema}
    with pytest.raises(UnsupportedConstraint):
        engine.add_request("JSON:", SamplingParams(json_schema=schema))


def test_a_schema_longer_than_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=f"json_schema is longer than {MAX_SCHEMA_CHARS} characters"):
        SamplingParams(json_schema={"description": "x" * MAX_SCHEMA_CHARS})
