from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nanovllm.pipeline.documents.json_spans import leaves, parse_output

texts = st.text(st.characters(codec="utf-8"))
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    scalars | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


def at(value: Any, pointer: str) -> Any:
    for name in pointer.split("/")[1:]:
        key = name.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


@given(values, st.sampled_from([None, 1]), st.booleans())
@example({"a/b": {"~": [], "": {}}}, None, True)
def test_the_value_is_that_of_json_and_each_span_is_its_leaf(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    parsed = parse_output(f" {text}\n")
    assert json.dumps(parsed.value) == json.dumps(value)
    assert dict(leaves(value)).keys() == parsed.spans.keys()
    for pointer, leaf in leaves(value):
        assert at(value, pointer) == leaf
        start, end = parsed.spans[pointer]
        shown = f" {text}\n"[start:end]
        assert json.loads(f'"{shown}"' if isinstance(leaf, str) and leaf else shown) == leaf


@given(st.text('{}[]":,0123456789.eE+-truefalsn\\u d8 \n\t'))
@example("[1,]")
@example('{"a":1,}')
@example("1 2")
@example("01")
@example("-")
@example("+1")
@example("1.")
@example('"\n"')
@example("NaN")
@example("\u0661")
def test_what_json_refuses_is_refused(text: str) -> None:
    def refuse(_: str) -> None:
        raise ValueError("no number of JSON")

    try:
        expected = json.loads(text, parse_constant=refuse)
    except ValueError:
        with pytest.raises(ValueError, match="no JSON at character"):
            parse_output(text)
        return
    with contextlib.suppress(ValueError):
        # Fails for what readers would take differently, which has tests of its own.
        assert parse_output(text).value == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "a": 2}', "twice"),
        ("9007199254740993", "2\\^53"),
        ("9" * 5_000, "2\\^53"),
        ("1e999", "infinity"),
        ('"\\ud800"', "Unicode"),
        ("[" * 40 + "]" * 40, "32 levels"),
        ("[" * 100_000, "32 levels"),
        ('{"a": "x', "does not end"),
        ('{"a": ', "ends before the value"),
        ('{"a": 1', "',' is missing"),
        ("", "ends before the value"),
    ],
)
def test_what_readers_take_differently_and_what_is_cut_is_refused_without_its_text(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        parse_output(text)
    assert len(str(caught.value)) < 100
