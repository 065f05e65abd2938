"""Schema splitting and merging: parts by branches, their values as one, validated whole."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import ConfigurationError, UnsupportedConstraint
from nanovllm.pipeline.documents.json_spans import leaves, parse_output
from nanovllm.pipeline.documents.schema_parts import count_leaves, merge_parts, split_schema
from nanovllm.pipeline.documents.validation import SchemaValidator
from nanovllm.sampling_params import SamplingParams


def branch(*names: str, **keywords: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}, **keywords}


SCHEMA: dict[str, Any] = {
    "$defs": {"money": branch("amount", "currency", required=["amount"])},
    "title": "Loan",
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "loan": {
            "type": "object",
            "description": "the loan",
            "properties": {
                "limit": {"$ref": "#/$defs/money"},
                "fee": {"$ref": "#/$defs/money"},
                "a/b": {"type": ["string", "null"]},
            },
            "required": ["limit"],
        },
        "rows": {"type": "array", "items": branch("x", "y")},
        "note": {"anyOf": [{"type": "null"}, {"type": "string"}]},
    },
    "required": ["loan", "rows"],
}
VALUE = {
    "name": "n",
    "loan": {"limit": {"amount": "1", "currency": "EUR"}, "fee": {"amount": "2"}, "a/b": None},
    "rows": [{"x": "1"}, {"x": "2"}],
    "note": None,
}


@pytest.mark.parametrize(
    ("schema", "leaves"),
    [
        (SCHEMA, 9),
        ({}, 1),
        (True, 1),
        ({"type": "array"}, 1),
        ({"anyOf": [branch("a"), branch("a", "b"), {"type": "null"}]}, 2),
        ({"allOf": [branch("a"), branch("b")]}, 2),
        ({"prefixItems": [{}, branch("a", "b")], "items": branch("c")}, 4),
        ({"$defs": {"n": branch("a", required=[])}, "$ref": "#/$defs/n"}, 1),
        ({"type": "object", "properties": {"value": {}, "next": {"$ref": "#"}}}, 2),
    ],
)
def test_leaves_are_counted_through_references_arrays_and_choices(schema: Any, leaves: int) -> None:
    assert count_leaves(schema) == leaves


def test_a_schema_that_doubles_with_each_reference_is_counted_at_once() -> None:
    defs: dict[str, Any] = {"a0": {"type": "string"}}
    for level in range(1, 200):
        ref = {"$ref": f"#/$defs/a{level - 1}"}
        defs[f"a{level}"] = {"properties": {"x": ref, "y": ref}}
    assert count_leaves({"$defs": defs, "$ref": "#/$defs/a199"}) == 2**199


@given(st.integers(1, 12))
def test_parts_hold_every_leaf_once_none_too_many_and_merge_to_the_whole(max_leaves: int) -> None:
    if max_leaves == 1:
        with pytest.raises(UnsupportedConstraint, match="fee has 2 leaves"):
            split_schema(SCHEMA, max_leaves)
        return
    before = copy.deepcopy(SCHEMA)
    parts = split_schema(SCHEMA, max_leaves)
    assert before == SCHEMA
    assert all(count_leaves(part) <= max_leaves for part in parts)
    assert sum(count_leaves(part) for part in parts) == count_leaves(SCHEMA)
    assert (len(parts) == 1) == (max_leaves >= 9)
    values = [restricted(VALUE, part, part) for part in parts]
    for part, value in zip(parts, values, strict=True):
        jsonschema.Draft202012Validator.check_schema(part)
        jsonschema.validate(value, part)
    merged = merge_parts(values)
    assert merged == VALUE
    assert list(leaves(merged)) == list(leaves(VALUE)), "in the schema's order"
    assert SchemaValidator(SCHEMA).validate(merged).ok


def restricted(value: Any, part: Any, root: Any) -> Any:
    """What of ``value`` a part asks for."""
    if part.get("$ref"):
        part = root["$defs"][part["$ref"].removeprefix("#/$defs/")]
    if isinstance(value, dict) and "properties" in part:
        return {
            name: restricted(value[name], inner, root) for name, inner in part["properties"].items() if name in value
        }
    return value


def test_parts_are_closed_keep_what_is_required_and_describe_themselves() -> None:
    parts = split_schema(SCHEMA, 4)
    assert [list(part["properties"]) for part in parts] == [["name"], ["loan"], ["loan", "rows", "note"]]
    assert [part["required"] for part in parts] == [[], ["loan"], ["loan", "rows"]]
    assert all(part["additionalProperties"] is False and part["title"] == "Loan" for part in parts)
    loans = [part["properties"]["loan"] for part in parts[1:]]
    assert [list(loan["properties"]) for loan in loans] == [["limit", "fee"], ["a/b"]]
    assert [loan["required"] for loan in loans] == [["limit"], []]
    assert all(loan["description"] == "the loan" for loan in loans)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"anyOf": [{"required": ["name"]}]}, "because of anyOf"),
        ({"minProperties": 2}, "because of minProperties"),
        ({"patternProperties": {"^x": {}}}, "because of patternProperties"),
        ({"additionalProperties": {"type": "string"}}, "no object with properties alone"),
        ({"properties": {"rows": {"type": "array", "items": branch(*"abcde")}}}, "#/properties/rows has 5 leaves"),
        ({"required": []}, "#/properties/loan has 5 leaves and is optional"),
        ({"properties": {**SCHEMA["properties"], "z": {"$ref": "#/properties/name"}}}, r"\$ref at #/properties/z"),
    ],
    ids=str,
)
def test_what_cannot_be_split_is_refused_with_its_place_and_reason(change: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedConstraint, match=why):
        split_schema({**SCHEMA, **change}, 4)


def test_what_fits_is_one_part_whatever_its_keywords() -> None:
    whole = {"anyOf": [branch("a"), {"type": "null"}]}
    closed = {"anyOf": [branch("a", additionalProperties=False), {"type": "null"}]}
    assert split_schema(whole, 1) == [closed]
    assert split_schema({"name": "x", "strict": True, "schema": whole}, 1) == [closed]
    assert merge_parts([None]) is None


def test_numbers_are_bounded_where_they_have_no_bounds_of_their_own() -> None:
    schema = {
        "$defs": {"n": {"type": "integer", "maximum": 9}},
        "properties": {
            "a": {"type": "number"},
            "b": {"type": ["integer", "null"], "exclusiveMinimum": 0},
            "c": {"type": "string"},
            "d": {"enum": [2**60]},
            "e": {"$ref": "#/$defs/n"},
        },
    }
    before = copy.deepcopy(schema)
    (bounded,) = split_schema(schema, 9)
    assert schema == before
    assert bounded["$defs"]["n"] == {"type": "integer", "minimum": -(2**53), "maximum": 9}
    assert bounded["additionalProperties"] is False
    assert bounded["properties"] == {
        "a": {"type": "number", "minimum": -(2**53), "maximum": 2**53},
        "b": {"type": ["integer", "null"], "exclusiveMinimum": 0, "maximum": 2**53},
        "c": {"type": "string"},
        "d": {"enum": [2**60]},
        "e": {"$ref": "#/$defs/n"},
    }


@pytest.mark.parametrize(
    ("schema", "is_closed"),
    [
        ({"items": branch("a")}, True),
        ({"anyOf": [branch("a"), branch("b")]}, True),
        ({"allOf": [branch("a"), branch("b")]}, False),
        ({"$defs": {"n": branch("a")}, "$ref": "#/$defs/n", "properties": {"b": {}}}, False),
        ({"$defs": {"n": branch("a")}, "$ref": "#/$defs/n", "title": "n"}, True),
        (branch("a", anyOf=[branch("b"), branch("c")]), False),
        (branch("a", additionalProperties=True), False),
        (branch("a", patternProperties={"^x": {}}), False),
        (branch("a", required=["b"]), False),
        (branch("a", minProperties=2), False),
    ],
    ids=str,
)
def test_objects_are_closed_unless_schemas_hold_for_one_together(schema: dict[str, Any], is_closed: bool) -> None:
    (narrowed,) = split_schema(schema, 9)
    assert ('"additionalProperties": false' in json.dumps(narrowed)) == is_closed
    assert is_closed or narrowed == schema


@pytest.mark.parametrize("kind", ["number", "integer"])
def test_with_bounds_every_finished_output_of_a_wild_model_is_one_that_messages_carry(kind: str) -> None:
    schema = {"type": "array", "items": {"type": kind}, "minItems": 3, "maxItems": 3}
    (part,) = split_schema(schema, 9)
    params = [SamplingParams(temperature=3.0, seed=seed, max_tokens=200, json_schema=part) for seed in range(16)]
    with LLMEngine("tiny-receipts") as engine:
        outputs = [one for one in engine.generate(["x"] * 16, params, use_tqdm=False) if one.finish_reason == "stop"]
    assert outputs
    assert all(SchemaValidator(schema).validate(parse_output(one.text).value).ok for one in outputs)


def test_two_values_in_one_place_are_an_error_not_a_choice() -> None:
    for values in ([{"a": 1}, {"a": 2}], [{"a": {"b": 1}}, {"a": [1]}], [{"a": 1}, [1]]):
        with pytest.raises(ValueError, match="part"):
            merge_parts(values)


@pytest.mark.parametrize(
    ("value", "errors"),
    [
        (VALUE, []),
        ({**VALUE, "name": 1}, [("/name", "type")]),
        ({"rows": []}, [("", "required")]),
        (
            {"loan": {"limit": {}, "a/b": 1}, "rows": [{"x": 2}]},
            [("/loan/a~1b", "type"), ("/loan/limit", "required"), ("/rows/0/x", "type")],
        ),
        ({**VALUE, "rows": [{"x": 1}] * 50}, [(f"/rows/{index}/x", "type") for index in range(20)]),
    ],
)
def test_errors_have_path_and_keyword(value: Any, errors: list[tuple[str, str]]) -> None:
    outcome = SchemaValidator(SCHEMA).validate(value)
    assert sorted((one.path, one.keyword) for one in outcome.errors) == sorted(errors)
    assert outcome.ok == (not errors)


def test_validation_means_what_guidance_enforces() -> None:
    # Each is read otherwise, or not at all, by a validator of draft 2020-12.
    draft4 = SchemaValidator({"type": "number", "minimum": 0, "exclusiveMinimum": True})
    assert [draft4.validate(value).ok for value in (1, 0)] == [True, False]
    draft7 = SchemaValidator({"type": "object", "dependencies": {"a": ["b"]}})
    assert [draft7.validate(value).ok for value in ({"a": 1, "b": 1}, {"a": 1})] == [True, False]
    decimal = SchemaValidator({"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"})
    assert [decimal.validate(value).ok for value in ("1.5", "-")] == [True, False]
    dated = SchemaValidator({"type": "string", "format": "date"})
    assert [dated.validate(value).ok for value in ("2024-02-29", "2023-02-29")] == [True, False]


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"$ref": "http://127.0.0.1:9/schema"}, "Retrieval is disabled"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"type": "text"}, "cannot be validated against"),
        ({"pattern": "("}, "cannot be validated against"),
        ({"pattern": "(?=a)b"}, "cannot be validated against"),
    ],
)
def test_schemas_that_no_value_can_be_judged_by_are_refused(schema: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedConstraint, match=why):
        SchemaValidator(schema)


@pytest.mark.parametrize("key", ["allOf", "anyOf", "oneOf"])
def test_a_schema_of_2_to_the_40_evaluations_is_refused_before_it_is_evaluated(key: str) -> None:
    defs: dict[str, Any] = {"a0": {"type": "string"}}
    for level in range(1, 41):
        defs[f"a{level}"] = {key: [{"$ref": f"#/$defs/a{level - 1}"}] * 2}
    with pytest.raises(UnsupportedConstraint, match="evaluations"):
        SchemaValidator({"$defs": defs, "$ref": "#/$defs/a40"})


def test_a_pattern_that_python_would_backtrack_on_is_matched_at_once() -> None:
    # 2^200 steps for `re`: pytest's own timeout is the judge.
    assert not SchemaValidator({"type": "string", "pattern": "^(a+)+$"}).validate("a" * 200 + "!").ok


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["x", "EUR", ""]),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(["loan", "rows", "limit", "amount", "x", "a/b"]), inner, max_size=3)
        ),
    )
)
def test_verdicts_are_those_of_jsonschema(value: Any) -> None:
    assert SchemaValidator(SCHEMA).validate(value).ok == jsonschema.Draft202012Validator(SCHEMA).is_valid(value)
    assert SchemaValidator(SCHEMA["$defs"]["money"]).validate(value).ok == jsonschema.Draft202012Validator(
        SCHEMA["$defs"]["money"]
    ).is_valid(value)


def test_the_digest_is_of_the_meaning_not_of_the_order_of_keys() -> None:
    turned = dict(reversed(SCHEMA.items()))
    assert SchemaValidator(turned).schema_sha256 == SchemaValidator(SCHEMA).schema_sha256
    assert SchemaValidator({"type": "null"}).schema_sha256 != SchemaValidator(SCHEMA).schema_sha256
    refused = SchemaValidator(SCHEMA).refused("no JSON at character 3: a value is missing")
    assert (refused.ok, refused.errors[0].keyword, refused.errors[0].path) == (False, "json", "")


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema_rs", None)
    with pytest.raises(ConfigurationError, match=r"'.\[documents\]'"):
        SchemaValidator(SCHEMA)
