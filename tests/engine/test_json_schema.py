"""What llguidance gets instead of a schema means exactly what the schema means."""

from __future__ import annotations

import enum
import json
import re
from datetime import date
from decimal import Decimal
from itertools import product
from typing import Annotated, Any

import jsonschema
import pytest
from pydantic import BaseModel, ConfigDict, Field

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
    "a property that a pattern matches": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {}},
        "patternProperties": {"^a$": {"maximum": 1}, "^[ab]": {"type": ["integer", "array"]}},
    },
    "a pattern that is a property's name": {
        "properties": {"a": {"type": "integer"}},
        "patternProperties": {"^a$": {"minimum": 2}},
        "additionalProperties": False,
    },
    "keywords that assert nothing": {
        **OBJECT,
        "propertyNames": {"type": "string"},
        "unevaluatedProperties": True,
        "dependencies": {},
        "properties": {**OBJECT["properties"], "a": {"type": "array", "uniqueItems": False}},
    },
    "names of an enum": {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": A["a"]},
    "names by reference": {
        "type": "object",
        "propertyNames": {"$ref": "#/$defs/Name"},
        "$defs": {"Name": {"enum": ["a", "c"], "title": "Name", "type": "string"}},
    },
    "names by a pattern": {"type": "object", "propertyNames": {"pattern": "^[ab]$"}, "minProperties": 1},
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


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unique items": ({"properties": {"a": {"uniqueItems": True}}}, "uniqueItems at #/properties/a .*: leave it out"),
    "not": ({"anyOf": [{}, {"not": {}}]}, "not at #/anyOf/1 cannot be enforced: write what is allowed"),
    "if": ({"if": {"required": ["a"]}, "then": {"required": ["b"]}}, "if at # .*: write anyOf"),
    "contains": ({"items": {"contains": {}}}, "contains at #/items .*: write prefixItems"),
    "names beside properties": (
        {**OBJECT, "propertyNames": {"pattern": "^a"}},
        "propertyNames at # .*: write properties or patternProperties",
    ),
    "look-ahead": ({"properties": {"a": {"pattern": "^(?!x)"}}}, r"the pattern at #/properties/a looks ahead"),
    "a pattern with no name left": (
        {"properties": {**A, **B}, "patternProperties": {"^(a|b)$": {}}},
        "patternProperties '.*' at # matches 'a', which properties has too",
    ),
    "only unknown keywords": ({"fields": {"a": "integer"}}, "'fields' at # is no keyword of JSON Schema"),
    "only unknown keywords inside": ({"items": {"description": "a", "kind": 3}}, "'kind' at #/items is no keyword"),
    "a keyword misspelt": (
        {"type": "string", "maxlength": 3},
        "'maxlength' at # is no keyword: did you mean maxLength",
    ),
    "another one": ({"typ": "integer"}, "'typ' at # is no keyword: did you mean type"),
    "a reference to itself": ({"$ref": "#"}, "no finite value conforms"),
    "references in a circle": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}},
        "no finite value conforms",
    ),
    "a list that needs itself": (
        {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1}}, "$ref": "#/$defs/a"},
        "no finite value conforms",
    ),
    "an object that needs itself": (
        {"type": "object", "properties": {"a": {"allOf": [{"$ref": "#"}]}}, "required": ["a"]},
        "no finite value conforms",
    ),
}


@pytest.mark.parametrize(("schema", "why"), REFUSED.values(), ids=list(REFUSED))
def test_a_refusal_names_the_keyword_its_path_and_what_to_write(
    engine: LLMEngine, schema: dict[str, Any], why: str
) -> None:
    with pytest.raises(UnsupportedConstraint, match=f"json_schema: .*{why}"):
        engine.add_request("JSON:", SamplingParams(json_schema=schema))


TREE = {
    "type": "object",
    "properties": {"left": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["left"],
    "additionalProperties": False,
}


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Receipt(BaseModel):
    model_config = ConfigDict(extra="forbid")
    total: Decimal
    counts: dict[Colour, Annotated[int, Field(ge=0, le=9)]]
    when: date | None
    tags: Annotated[list[Colour], Field(max_length=2)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "schema",
    [
        TREE,
        Receipt.model_json_schema(),
        Receipt.model_json_schema(mode="serialization"),
        {"type": "object", "properties": {"score": {"enum": [1, 2]}}, "patternProperties": {"^score$": {"minimum": 2}},
         "required": ["score"], "additionalProperties": False},
    ],
    ids=["tree", "pydantic", "pydantic's output", "property and pattern"],
)  # fmt: skip
def test_what_is_taken_is_kept(engine: LLMEngine, schema: dict[str, Any], seed: int) -> None:
    for options in ({"temperature": 1.0}, {"temperature": 2.0, "top_k": 5}):
        sampling = SamplingParams(json_schema=schema, seed=seed, max_tokens=500, **options)
        output = engine.generate("JSON:", sampling, use_tqdm=False)[0]
        if output.finish_reason == "stop":
            jsonschema.Draft202012Validator(schema).validate(json.loads(output.text))
        else:
            assert len(output.token_ids) == 500


def test_an_exclusive_bound_of_draft_4_is_one(engine: LLMEngine) -> None:
    schema = {"type": "integer", "minimum": 3, "exclusiveMinimum": True, "maximum": 5, "exclusiveMaximum": True}
    texts = {
        engine.generate("JSON:", SamplingParams(json_schema=schema, seed=seed), use_tqdm=False)[0].text
        for seed in range(4)
    }
    assert texts == {"4"}
    assert enforceable({"maximum": 5, "exclusiveMaximum": False}) == {"maximum": 5}


class Tags(BaseModel):
    tags: set[int]


def test_a_set_of_pydantic_is_refused_with_what_to_write(engine: LLMEngine) -> None:
    with pytest.raises(UnsupportedConstraint, match=r"uniqueItems at #/properties/tags .*list for set"):
        engine.add_request("JSON:", SamplingParams(json_schema=Tags.model_json_schema()))


def test_the_pattern_of_a_decimal_matches_the_same_without_looking_ahead(engine: LLMEngine) -> None:
    theirs = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"  # pydantic 2.8 to 2.13
    ours = enforceable({"type": "string", "pattern": theirs})["pattern"]
    texts = ["".join(letters) for length in range(6) for letters in product("+-.07a", repeat=length)]
    assert [text for text in texts if bool(re.search(theirs, text)) != bool(re.search(ours, text))] == []
    sampling = SamplingParams(json_schema={"type": "string", "pattern": theirs}, max_tokens=60)
    output = engine.generate("JSON:", sampling, use_tqdm=False)[0]
    assert output.finish_reason == "length" or re.search(theirs, json.loads(output.text))


def test_the_wrapper_of_openai_is_understood(engine: LLMEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    wrapped = {"name": "answer", "strict": True, "schema": schema}
    for given in (schema, wrapped, {"type": "json_schema", "json_schema": wrapped}):
        sampling = SamplingParams(json_schema=given, max_tokens=40)
        assert engine.generate("JSON:", sampling, use_tqdm=False)[0].text == '{"a": 1}'
    properties = {"properties": {"name": {"enum": ["x"]}, "schema": {"enum": [2]}}, "required": ["name", "schema"]}
    sampling = SamplingParams(
        json_schema={"type": "object", **properties, "additionalProperties": False}, max_tokens=40
    )
    assert engine.generate("JSON:", sampling, use_tqdm=False)[0].text == '{"name": "x", "schema": 2}'


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
