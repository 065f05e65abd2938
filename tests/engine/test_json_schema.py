"""What llguidance gets instead of a schema means exactly what the schema means."""

from __future__ import annotations

import enum
import json
import re
from datetime import date
from decimal import Decimal
from functools import partial
from itertools import product
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, ConfigDict, Field

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sampling.exclusive_branches import Exclusion
from nanovllm.engine.sampling.grammar_messages import refusal
from nanovllm.engine.sampling.json_schema import enforceable, resolve
from nanovllm.errors import UnsupportedConstraint
from nanovllm.sampling_params import MAX_SCHEMA_CHARS, SamplingParams

A, B, C = ({name: {"type": "integer"}} for name in "abc")
OBJECT: dict[str, Any] = {"type": "object", "properties": {**A, **B, **C}}

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
    "branches told apart by a property": {
        "oneOf": [{"$ref": "#/$defs/one"}, {"$ref": "#/$defs/two"}, {"type": "integer"}],
        "$defs": {
            "one": {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
            "two": {"type": "object", "properties": {"a": {"enum": [2, "x"]}}, "required": ["a"]},
        },
    },
    "branches told apart beside the choice": {
        **OBJECT,
        "required": ["a"],
        "oneOf": [{"properties": {"a": {"maximum": 1}}}, {"properties": {"a": {"exclusiveMinimum": 1}}}],
    },
    "branches of lists and texts by their length": {
        "oneOf": [
            {"type": "array", "maxItems": 0},
            {"type": "array", "minItems": 1, "items": {"type": "string"}},
            {"type": "string", "minLength": 1},
            {"type": "object", "required": ["b"], "additionalProperties": False, "properties": B},
            {"type": "object", "required": ["a"], "properties": A},
        ]
    },
    "a reference to an anchor": {
        "$ref": "#named",
        "$defs": {"x/y z": {"$anchor": "named", "type": "object", "required": ["a"], "properties": A}},
    },
    "a reference to an anchor of draft 6": {
        "properties": {"a": {"$ref": "#named"}},
        "definitions": {"x": {"$id": "#named", "type": "integer"}},
    },
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
    if any(word in json.dumps(schema) for word in ("dependentRequired", "dependentSchemas", "$anchor")):
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
    "look-ahead": (
        {"properties": {"a": {"pattern": "^(?!x)"}}},
        r"pattern at #/properties/a .*'\(\?!' at character 2, look-around",
    ),
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
    "branches that may hold at once": (
        {"items": {"oneOf": [{"type": "integer"}, {"type": "number"}]}},
        "oneOf at #/items cannot be enforced: .* write anyOf",
    ),
    "branches of which nothing is known": ({"oneOf": [{}, {"type": "string"}]}, "oneOf at # .* write anyOf"),
    "branches whose property need not be there": (
        {"oneOf": [{"type": "object", "properties": {"a": {"const": value}}} for value in (1, 2)]},
        "oneOf at # .* write anyOf",
    ),
    "a pattern that is none": (
        {"$defs": {"n/m": {"type": "string", "pattern": "x(a"}}, "$ref": "#/$defs/n~1m"},
        r"pattern at #/\$defs/n~1m .*'\(' at character 2, unclosed group",
    ),
    "a pattern of a name that is none": (
        {"anyOf": [{"type": "object", "patternProperties": {"[z-a]": {}}}]},
        "patternProperties at #/anyOf/0 .*'z-a' at character 2, invalid character class range",
    ),
    "a word boundary": ({"type": "string", "pattern": r"\bx"}, r"pattern at # .*\\b in .* is not supported: write"),
    "a type misspelt": ({"items": {"type": "strin"}}, 'type at #/items is "strin", .*did you mean string'),
    "a type of Python": ({"type": ["dict", "null"]}, 'type at # is "dict", .*did you mean object'),
    "a type of nothing": ({"type": "zzz"}, 'type at # is "zzz", .*write array, boolean'),
    "a step of 0": ({"items": {"multipleOf": 0}}, "multipleOf at #/items is 0: write a number above 0"),
    "a step below 0": ({"type": "number", "multipleOf": -1}, "multipleOf at # is -1: write a number above 0"),
    "a step of many digits": ({"type": "number", "multipleOf": 0.3333}, "multipleOf at # .*of fewer digits"),
    "a bound too large": ({"type": "number", "maximum": 1e300}, "maximum at # .*write one nearer to 0"),
    "a bound too large of integers": (
        {"properties": {"a": {"type": "integer", "minimum": 10**30}}},
        "minimum at #/properties/a .*write one nearer to 0",
    ),
    "a bound that is no number": ({"type": "number", "minimum": "x"}, 'minimum at # .*"x" is no number'),
    "properties that are none": ({"items": {"properties": 7}}, "properties at #/items .*write an object"),
    "a reference to nothing": ({"items": {"$ref": "#/$defs/x"}}, r"\$ref at #/items .*nothing is at #/\$defs/x: write"),
    "a reference to no anchor": ({"$ref": "#foo"}, r"\$ref at # .*no \$anchor is foo: write"),
    "a reference outside": ({"items": {"$ref": "http://x/y"}}, r"\$ref at #/items .*put the schema under \$defs"),
    "patterns that one name matches": (
        {"type": "object", "patternProperties": {"^a": {}, "^ab": {}}},
        "patternProperties at # .*one name matches both",
    ),
    "no text between two lengths": (
        {"type": "array", "items": {"type": "string", "minLength": 5, "maxLength": 3}, "minItems": 1},
        "no value conforms to minLength at #/items",
    ),
    "no text of a format and a pattern": (
        {
            "type": "object",
            "properties": {"a": {"type": "string", "format": "uuid4", "maxLength": 9}},
            "required": ["a"],
        },
        "no value conforms to .* at #/properties/a",
    ),
    "properties whose names are not given": (
        {"items": {"type": "object", "minProperties": 2}},
        "minProperties is 2 at #/items .*name them in required",
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


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"regex": "ab(?=c)"}, r"regex: '\(\?=' at character 3, look-around"),
        ({"regex": "(a"}, r"regex: '\(' at character 1, unclosed group: close it"),
        ({"regex": r"(a)\1"}, r"regex: '.*' at character 4, backreferences are not supported: write"),
        ({"regex": r"a\b"}, r"regex: \\b in .* is not supported: write"),
        ({"regex": "x\\"}, "regex: the last character, a backslash, .*: write two"),
        ({"grammar": "start: foo"}, 'grammar: line 1, column 8: unknown name: "foo"; define it'),
        ({"grammar": "start: /a(?=b)/"}, r"grammar: line 1, column 8: '\(\?=' at character 2"),
        ({"grammar": "begin: /a/"}, "grammar: no start rule found; write a rule start"),
        ({"grammar": 'start: %json {"oneOf": [{}, {}]}'}, "grammar: line 1, column 8: oneOf in %json: .*write anyOf"),
    ],
)
def test_a_refusal_of_an_expression_or_a_grammar_names_the_construct_its_place_and_what_to_write(
    engine: LLMEngine, options: dict[str, str], why: str
) -> None:
    with pytest.raises(UnsupportedConstraint, match=why):
        engine.add_request("Text:", SamplingParams(**options))


def test_a_message_of_llguidance_that_is_not_known_has_the_keyword_and_its_path() -> None:
    def compile_(grammar: str) -> str | None:
        return "a message of its own" if '"minimum": 7' in grammar else None

    schema = {"items": {"type": "object", "properties": {"a": {"type": "integer", "minimum": 7}}}}
    said = refusal(json.dumps({"grammars": [{"json_schema": schema}]}), "a message of its own", compile_)
    assert said == "minimum at #/items/properties/a cannot be enforced: a message of its own"


def test_branches_are_compared_within_a_number_of_steps() -> None:
    circle: dict[str, Any] = {"type": "object", "required": [f"p{i}" for i in range(30)]}
    circle["properties"] = {f"p{i}": {"$ref": "#/$defs/a"} for i in range(30)}
    schema: dict[str, Any] = {"oneOf": [{"$ref": "#/$defs/a"}] * 30, "$defs": {"a": circle}}
    exclusion = Exclusion(partial(resolve, schema), steps_left=1_000)
    assert not exclusion.of_all(schema["oneOf"], {})
    assert -100_000 < exclusion.steps_left <= 0
    assert "oneOf" in enforceable(schema)


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=0, le=9)]


class Bird(BaseModel):
    kind: Literal["owl", "duck"]
    name: Annotated[str, Field(max_length=3)]


class Owner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    pets: Annotated[list[Annotated[Cat | Bird, Field(discriminator="kind")]], Field(max_length=1, min_length=1)]


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
        Owner.model_json_schema(),
        {"type": "object", "properties": {"score": {"enum": [1, 2]}}, "patternProperties": {"^score$": {"minimum": 2}},
         "required": ["score"], "additionalProperties": False},
    ],
    ids=["tree", "pydantic", "pydantic's output", "pydantic's union", "property and pattern"],
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
