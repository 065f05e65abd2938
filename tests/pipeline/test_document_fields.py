"""Fields of a guided output: offsets of tokens, log probabilities of leaves, leaves without a value."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.text.detokenizer import Detokenizer
from nanovllm.pipeline.documents.fields import fields_of, missing_properties, pieces_of, token_spans
from nanovllm.pipeline.documents.json_spans import parse_output
from nanovllm.sampling_params import SamplingParams


def fields(pieces: list[str], logprobs: list[float | None], schema: Any = None) -> dict[str, Any]:
    found = fields_of(parse_output("".join(pieces)), schema, pieces, logprobs)
    return {pointer: (one.source, one.logprob_min, one.logprob_mean) for pointer, one in found.items()}


def test_a_token_that_shares_punctuation_with_a_value_counts_and_punctuation_alone_does_not() -> None:
    pieces = ['{"', "total", '": ', "12", '.50, "', 'to": "', "A", ' b"', "}"]
    logprobs = [-9.0, -9.0, -9.0, -1.0, -3.0, -9.0, -0.5, -0.25, -9.0]
    assert fields(pieces, logprobs) == {"/total": ("model", -3.0, -2.0), "/to": ("model", -0.5, -0.375)}


def test_a_token_over_two_values_counts_for_both() -> None:
    assert fields(["[1", ",2,", "3]"], [-1.0, -2.0, -4.0]) == {
        "/0": ("model", -1.0, -1.0),
        "/1": ("model", -2.0, -2.0),
        "/2": ("model", -4.0, -4.0),
    }


def test_bytes_of_one_character_all_count_for_it() -> None:
    # é in two byte tokens, 日 in three: the detokenizer gives the text with the last.
    pieces = ['["', "", "é", '","', "", "", "日", '"]', ""]
    assert token_spans(pieces) == [(0, 2), (2, 3), (2, 3), (3, 6), (6, 7), (6, 7), (6, 7), (7, 9), (9, 9)]
    logprobs = [-9.0, -5.0, -1.0, -9.0, -1.0, -4.0, -1.0, -9.0, -9.0]
    assert fields(pieces, logprobs) == {"/0": ("model", -5.0, -3.0), "/1": ("model", -4.0, -2.0)}


def test_forced_tokens_have_no_log_probability_and_a_value_of_them_alone_has_none() -> None:
    assert fields(['["', "a", "b", '",1]'], [None, None, -0.5, None]) == {
        "/0": ("model", -0.5, -0.5),
        "/1": ("model", None, None),
    }


def test_null_empty_and_left_out_values_are_absent_and_keep_what_is_known() -> None:
    schema = {
        "$defs": {"item": {"type": "object", "properties": {"name": {}, "price": {"$ref": "#/$defs/none"}}}},
        "properties": {
            "a": {"type": "null"},
            "rows": {"type": "array", "items": {"$ref": "#/$defs/item"}},
            "pair": {"prefixItems": [{"properties": {"x": {}}}]},
            "b/c": {"type": "object", "properties": {"d": {}}},
        },
    }
    pieces = ['{"a":', "null", ',"rows":', '[{"name":', "0", '}],"pair":[', "{}", ',""]}']
    logprobs = [-9.0, -0.5, -9.0, -9.0, -0.25, -9.0, -2.0, -3.0]
    assert fields(pieces, logprobs, schema) == {
        "/a": ("absent", -0.5, -0.5),
        "/rows/0/name": ("model", -0.25, -0.25),
        "/pair/0": ("absent", -2.0, -2.0),
        "/pair/1": ("model", -3.0, -3.0),
        "/rows/0/price": ("absent", None, None),
        "/pair/0/x": ("absent", None, None),
        "/b~1c": ("absent", None, None),
    }


def test_references_in_a_circle_or_to_nothing_end() -> None:
    schema = {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        "properties": {"x": {"$ref": "#/$defs/a"}},
    }
    assert list(missing_properties({"x": {}}, schema)) == []
    assert list(missing_properties({"x": {}}, {"$ref": "#/nothing"})) == []


def test_pieces_are_what_each_token_added_and_the_last_has_the_rest() -> None:
    assert pieces_of('["é",1]', [2, 2, 3, 6, 6]) == ['["', "", "é", '",1', "]"]
    assert pieces_of("", []) == []
    assert pieces_of("", [0, 0]) == ["", ""]


def test_one_log_probability_for_each_token_or_none_at_all() -> None:
    assert fields_of(parse_output("[1]"))["/0"].logprob_min is None
    with pytest.raises(ValueError, match="3 pieces and 1 log probabilities"):
        fields_of(parse_output("[1]"), None, ["[", "1", "]"], [-1.0])


@given(st.lists(st.tuples(st.text(max_size=3), st.floats(-20, 0)), max_size=30))
def test_every_character_is_of_a_token_and_tokens_go_forward(tokens: list[tuple[str, float]]) -> None:
    pieces = [piece for piece, _ in tokens]
    spans = token_spans(pieces)
    text = "".join(pieces)
    assert len(spans) == len(pieces)
    assert spans == sorted(spans)
    assert {place for start, end in spans for place in range(start, end)} == set(range(len(text)))
    for piece, (start, end) in zip(pieces, spans, strict=True):
        assert not piece or text[start:end] == piece


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["receipt", "résumé"]},
        "total": {"type": "number", "minimum": 0, "maximum": 999},
        "rows": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
    },
    "required": ["kind", "total", "rows"],
    "additionalProperties": False,
}


def test_fields_of_guided_outputs_agree_with_a_count_by_hand() -> None:
    params = [
        SamplingParams(temperature=1.5, seed=seed, max_tokens=96, json_schema=SCHEMA, logprobs=0) for seed in range(6)
    ]
    with LLMEngine("tiny-receipts") as engine:
        outputs = [one for one in engine.generate(["read it"] * len(params), params) if one.finish_reason == "stop"]
        detokenizers = [Detokenizer(engine.tokenizer, params[0]) for _ in outputs]
    assert len(outputs) > 1
    for output, detokenizer in zip(outputs, detokenizers, strict=True):
        text_ends = output.outputs[0].text_ends
        assert text_ends is not None
        pieces = pieces_of(output.text, text_ends)
        assert pieces == [detokenizer.append(token) for token in output.token_ids]
        assert output.logprobs is not None
        logprobs = [next((one.logprob for one in place.values()), None) for place in output.logprobs]
        parsed = parse_output(output.text)
        assert parsed.value == json.loads(output.text)
        found = fields_of(parsed, SCHEMA, pieces, logprobs)
        assert any(one.logprob_min is not None for one in found.values())
        for pointer, (start, end) in parsed.spans.items():
            own = [
                one
                for one, (first, last) in zip(logprobs, token_spans(pieces), strict=True)
                if one is not None and first < end and start < last
            ]
            assert found[pointer].logprob_min == (min(own) if own else None)
            assert not own or math.isclose(found[pointer].logprob_mean or 0.0, sum(own) / len(own), abs_tol=1e-9)
