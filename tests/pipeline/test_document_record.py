"""The document record as a message: both encodings, the schema, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import msgpack
import pytest
from pydantic import ValidationError
from sample_messages import document_record

from nanovllm.messages.document_record import DocumentRecord, PageError, PageUse
from nanovllm.messages.encoding import encode
from nanovllm.messages.result import StoredResult
from nanovllm.pipeline.documents.sidecars import body_of
from tools import reference

SCHEMA = json.loads(reference.schemas()["document_record.v1.json"])


def test_the_value_is_pure_in_both_encodings_null_included() -> None:
    record = document_record()
    assert record.value == {"to": "Acme Ltd.", "iban": None, "rows": [], "total": 7.5}
    as_json = json.loads(encode(record, "json"))
    assert as_json["value"] == record.value
    assert msgpack.unpackb(encode(record, "msgpack")) == as_json
    assert DocumentRecord.model_validate(as_json) == record
    jsonschema.validate(as_json, SCHEMA)


def test_unset_is_left_out_and_readers_ignore_what_they_do_not_know() -> None:
    as_json = json.loads(encode(document_record(), "json"))
    assert "stored" not in as_json
    assert "page" not in as_json["fields"]["/iban"]
    assert as_json["fields"]["/total"]["span"] == [6, 10]
    assert DocumentRecord.model_validate({**as_json, "bbox": [0, 0, 1, 1]}) == document_record()


@pytest.mark.parametrize("value", [float("nan"), 2**53 + 1, "\ud800", {"a": float("inf")}, {1: "a"}])
def test_values_that_readers_take_differently_are_refused(value: Any) -> None:
    with pytest.raises(ValidationError):
        document_record(value=value)


def test_a_field_is_named_by_a_json_pointer() -> None:
    fields = document_record().fields
    with pytest.raises(ValidationError, match="JSON pointer"):
        document_record(fields={"total": fields["/total"]})
    assert document_record(value=7, fields={"": fields["/total"]}).fields[""].page == 2


def test_a_failed_page_has_an_error_and_no_other_has() -> None:
    error = PageError(code="decoder_failed", message="the page takes too long", retryable=False)
    assert PageUse(number=1, status="failed", error=error).error == error
    for status, given in (("failed", None), ("ok", error)):
        with pytest.raises(ValidationError, match="page 1"):
            PageUse(number=1, status=status, error=given)  # type: ignore[arg-type]


def test_a_stored_record_is_without_what_may_be_large() -> None:
    stored = StoredResult(uri="s3://b/k", sha256="0a", size=9)
    small = document_record(text="x" * 10_000).referring_to(stored)
    assert (small.value, small.fields, small.pages, small.text, small.metadata) == (None, {}, (), None, {})
    assert small.stored == stored
    assert small.document == document_record().document
    assert len(encode(small, "json")) < 1_500


def test_a_record_names_no_tenant() -> None:
    assert "tenant" not in json.dumps(SCHEMA)


def test_a_markdown_sidecar_shows_what_a_page_says_in_a_fence_that_it_cannot_leave() -> None:
    pages = (
        PageUse(number=1, status="ok", source="text_layer"),
        PageUse(number=2, status="ok", source="model"),
    )
    text = "<b>``` ````\n# no heading\f# heading"
    record = document_record(validation=None, value=None, fields={}, text=text, pages=pages)
    assert body_of(record, "markdown").decode() == ("`````text\n<b>``` ````\n# no heading\n`````\n\n---\n\n# heading")
    cut = document_record(value=None, fields={}, text='{"aw')
    assert body_of(cut, "jsonl").decode() == '{"text": "{\\"aw"}'
    assert body_of(cut, "markdown").decode() == '```text\n{"aw\n```'
