"""Merging of pages by rule: what comes from which page, what is dropped, and what is a conflict."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.messages.document_record import FieldMeta
from nanovllm.pipeline.documents.fields import fields_of
from nanovllm.pipeline.documents.json_spans import leaves, parse_output
from nanovllm.pipeline.documents.merging import MergeRule, merge_pages, merged_fields, merged_schema

PAGES: dict[int, Any] = {
    7: {"to": "Acme", "total": 12.0, "rows": [{"x": 1}, {"x": 1}], "by": None},
    8: {"to": "ACME", "total": 12, "rows": [{"x": 1.0}, {"x": 2}], "by": "Bob", "end": {"on": None}},
    10: {"to": None, "total": 13, "rows": [], "by": "Bob", "end": {"on": "May"}},
}


def test_per_document_takes_the_first_value_reports_the_others_and_drops_repeated_items() -> None:
    merged = merge_pages(PAGES, "per_document")
    assert merged.value == {
        "to": "Acme",
        "total": 12.0,
        "rows": [{"x": 1}, {"x": 1}, {"x": 2}],
        "by": "Bob",
        "end": {"on": "May"},
    }
    assert [(one.path, one.pages) for one in merged.conflicts] == [("/to", (8,)), ("/total", (10,))]
    assert merged.origins == {
        "/to": (7, "/to"),
        "/total": (7, "/total"),
        "/rows/0/x": (7, "/rows/0/x"),
        "/rows/1/x": (7, "/rows/1/x"),
        "/rows/2/x": (8, "/rows/1/x"),
        "/by": (8, "/by"),
        "/end/on": (10, "/end/on"),
    }


def test_per_row_keeps_equal_rows() -> None:
    merged = merge_pages(PAGES, "per_row")
    assert [row["x"] for row in merged.value["rows"]] == [1, 1, 1.0, 2]
    assert merged.origins["/rows/2/x"] == (8, "/rows/0/x")


def test_per_page_keeps_one_value_a_page_in_page_order() -> None:
    merged = merge_pages(PAGES, "per_page")
    assert merged.value == [PAGES[7], PAGES[8], PAGES[10]]
    assert merged.conflicts == ()
    assert merged.origins["/1/rows/0/x"] == (8, "/rows/0/x")


def test_values_that_python_takes_for_equal_and_json_does_not_are_different() -> None:
    merged = merge_pages({1: {"a": True, "b": [0]}, 2: {"a": 1, "b": [False, 0]}}, "per_document")
    assert merged.value == {"a": True, "b": [0, False]}
    assert [one.path for one in merged.conflicts] == ["/a"]
    assert merge_pages({1: [[0, 1]], 2: [{"0": 1}, [0, 1]]}, "per_document").value == [[0, 1], {"0": 1}]


@pytest.mark.parametrize("other", [None, {"a": None}, {}])
def test_a_page_that_says_nothing_changes_nothing(other: Any) -> None:
    merged = merge_pages({1: {"a": 1}, 2: other}, "per_document")
    assert (merged.value, merged.origins, merged.conflicts) == ({"a": 1}, {"/a": (1, "/a")}, ())
    turned = merge_pages({1: other, 2: {"a": 1}}, "per_document")
    assert (turned.value, turned.origins, turned.conflicts) == ({"a": 1}, {"/a": (2, "/a")}, ())


def test_a_list_beside_an_object_is_a_conflict() -> None:
    assert merge_pages({1: {"a": []}, 2: {"a": {"b": 1}}}, "per_row").conflicts[0].path == "/a"
    with pytest.raises(ValueError, match="no page has a value"):
        merge_pages({}, "per_row")


def test_the_schema_of_pages_is_an_array_of_the_whole_and_references_still_lead() -> None:
    schema = {"$defs": {"n": {"type": "integer"}}, "type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}}
    jsonschema.validate([{"a": 1}, {}], merged_schema(schema, "per_page"))
    assert not jsonschema.Draft202012Validator(merged_schema(schema, "per_page")).is_valid([{"a": "1"}])


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"properties": {"b": {"type": "integer"}, "a": {"$ref": "#/properties/b"}}}, {"a": 1}, {"a": "1"}),
        (
            {"anyOf": [{"type": "integer"}, {"type": "object", "additionalProperties": {"$ref": "#"}}]},
            {"a": 1},
            {"a": "1"},
        ),
        (
            {"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"const": {"$ref": "#"}}}},
            {"a": {"$ref": "#"}},
            {"a": 1},
        ),
    ],
)
def test_references_of_a_schema_per_page_mean_what_they_meant(schema: Any, right: Any, wrong: Any) -> None:
    whole = jsonschema.Draft202012Validator(merged_schema(schema, "per_page"))
    assert whole.is_valid([right, right])
    assert not whole.is_valid([right, wrong])
    assert merged_schema(schema, "per_row") == schema


def test_fields_follow_their_values_and_name_the_page_of_those_without_evidence() -> None:
    outputs = {1: '{"a": "x", "rows": ["p"]}', 2: '{"a": "y", "rows": ["q"]}'}
    parsed = {page: parse_output(text) for page, text in outputs.items()}
    fields = {
        page: fields_of(one, None, ["x" * (len(outputs[page]) - 1), "}"], [-float(page), None])
        for page, one in parsed.items()
    }
    fields[2]["/rows/0"] = fields[2]["/rows/0"].model_copy(update={"page": 4, "evidence": "exact"})
    merged = merge_pages({page: one.value for page, one in parsed.items()}, "per_row")
    found = merged_fields(merged, fields, {"properties": {"none": {}}})
    assert {pointer: (one.page, one.logprob_min) for pointer, one in found.items()} == {
        "/a": (1, -1.0),
        "/rows/0": (1, -1.0),
        "/rows/1": (4, -2.0),
        "/none": (None, None),
    }
    assert found["/none"] == FieldMeta(source="absent")


values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "c/d"]), inner, max_size=3),
)


@given(st.dictionaries(st.integers(1, 5), values, min_size=1), st.sampled_from(["per_document", "per_row", "per_page"]))
def test_every_leaf_stands_at_its_origin(pages: dict[int, Any], rule: MergeRule) -> None:
    merged = merge_pages(pages, rule)
    by_page = {page: dict(leaves(value)) for page, value in pages.items()}
    assert merged.origins.keys() == dict(leaves(merged.value)).keys()
    for pointer, leaf in leaves(merged.value):
        page, origin = merged.origins[pointer]
        if leaf not in ([], {}):
            assert by_page[page][origin] == leaf
