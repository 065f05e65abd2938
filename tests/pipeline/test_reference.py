from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import msgpack
import pytest
from hypothesis import given
from sample_messages import dead_letter, document_record, metrics, result
from strategies import jobs

from nanovllm.messages.codec import encode_job
from nanovllm.messages.encoding import encode
from nanovllm.messages.job import Job
from tools import reference

DOCS = Path(__file__).parents[2] / "docs"
JOB_SCHEMA = jsonschema.Draft202012Validator(json.loads(reference.schemas()["job.v1.json"]))


def test_the_published_schemas_are_those_of_the_models() -> None:
    published = {file.name: file.read_text() for file in (DOCS / "schemas").glob("*.json")}
    assert published == reference.schemas(), "run: PYTHONPATH=. python tools/reference.py"


def test_the_settings_page_is_that_of_the_settings() -> None:
    page = (DOCS / "settings.md").read_text()
    assert page == reference.settings_page(), "run: PYTHONPATH=. python tools/reference.py"


def test_the_page_of_dead_letter_codes_is_that_of_the_errors() -> None:
    page = (DOCS / "dead-letters.md").read_text()
    assert page == reference.codes_page(), "run: PYTHONPATH=. python tools/reference.py"


def test_the_page_of_metrics_is_that_of_the_registry() -> None:
    page = (DOCS / "metrics.md").read_text()
    assert page == reference.metrics_page(), "run: PYTHONPATH=. python tools/reference.py"


def test_the_table_of_backends_is_that_of_their_capabilities() -> None:
    page = (DOCS / "backends.md").read_text()
    assert reference.capabilities_table() in page
    assert page == reference.with_capabilities(page), "run: PYTHONPATH=. python tools/reference.py"


def test_the_table_of_profiles_is_that_of_the_shipped_ones() -> None:
    page = (DOCS / "profiles.md").read_text()
    assert reference.profiles_table() in page
    assert page == reference.with_profiles(page), "run: PYTHONPATH=. python tools/reference.py"


@pytest.mark.parametrize("name", list(reference.schemas()))
def test_every_schema_is_a_schema(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(reference.schemas()[name]))


def test_what_is_sent_follows_the_schemas() -> None:
    job = Job.model_validate(
        {
            "prompt": "a <|image|>",
            "job_id": "r-1",
            "images": [{"data": b"png"}],
            "sampling": {"stop": ["x"], "temperature": 0.5},
            "deadline": "2030-01-31T12:00:00Z",
        }
    )
    messages = {"job.v1.json": encode_job(job)}
    sent = {
        "result.v1": result(),
        "metrics.v1": metrics(),
        "dead-letter.v1": dead_letter(),
        "document_record.v1": document_record(),
    }
    for name, message in sent.items():
        messages[f"{name}.json"] = encode(message, "json")
    for name, message_bytes in messages.items():
        jsonschema.validate(json.loads(message_bytes), json.loads(reference.schemas()[name]))


@given(jobs)
def test_every_job_that_is_sent_follows_the_schema(job: Job) -> None:
    JOB_SCHEMA.validate(json.loads(encode_job(job)))


def test_the_schema_refuses_what_the_decoder_refuses() -> None:
    schema = json.loads(reference.schemas()["job.v1.json"])
    for wrong in (
        {},
        {"prompt": "a", "messages": [{"role": "user", "content": "a"}]},
        {"prompt": "a", "sampling": {"max_tokenz": 1}},
        {"prompt": "a", "images": [{"uri": "s3://bucket/k", "crc32": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_both_formats_of_a_result_hold_the_same_fields() -> None:
    assert msgpack.unpackb(encode(result(), "msgpack")) == json.loads(encode(result(), "json"))
    assert msgpack.unpackb(encode(dead_letter(), "msgpack")) == json.loads(encode(dead_letter(), "json"))
