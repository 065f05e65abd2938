"""A worker makes records of the documents that events name: once a version, whatever comes twice, late or broken."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bench import eventually
from document_bench import Documents, event
from document_files import FIELDS, drawn, receipts_pdf, receipts_route
from parts import create_topic, worker_process

from nanovllm.messages.document_record import DocumentRecord

LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)


def by_key(records: list[DocumentRecord]) -> dict[str, DocumentRecord]:
    return {record.document.uri.partition("/in/")[2]: record for record in records}


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_events_become_records_in_the_topic_and_beside_the_objects(documents: Documents, delivery: str) -> None:
    known = drawn(3)
    shown = {"a b+ü%20.pdf": known[:1], "deep/er/b.pdf": known}
    sent = [documents.put(f"in/{key}", receipts_pdf([one.image for one in pages])) for key, pages in shown.items()]
    settings = documents.settings(receipts_route(documents.bucket), page_store=True, delivery=delivery)
    await documents.send({"Records": sent[:1]}, {"Records": sent[1:]}, {"Records": sent[:1]}, partition=0)
    async with documents.working(**settings):
        await documents.ended(3)
    assert documents.counted() == {"result": 2, "same": 1}
    records = by_key(await documents.records(2))
    assert set(records) == set(shown)
    right = 0
    for key, pages in shown.items():
        record = records[key]
        assert record.status == "complete", (record.validation, record.text, record.pages)
        assert record.constrained
        assert [page.number for page in record.pages] == list(range(1, len(pages) + 1))
        right += sum(
            found[name] == one.fields[name] for found, one in zip(record.value, pages, strict=True) for name in FIELDS
        )
        sidecar = documents.s3.client.get_object(Bucket=documents.bucket, Key=f"in/{key}.json")
        assert DocumentRecord.model_validate_json(sidecar["Body"].read()) == record
        assert record.source is not None
        assert record.source.topic == documents.events
    assert right >= 0.75 * 4 * len(FIELDS)
    seconds = documents.bench.metrics.registry.get_sample_value
    inferred = seconds("nanovllm_stage_seconds_sum", {"stage": "infer"})
    assert inferred is not None
    assert 0 < inferred <= (seconds("nanovllm_messaging_process_duration_seconds_sum") or 0), (
        "a stage is no longer than the whole"
    )
    [metrics] = [
        one
        for one in await documents.bench.read(documents.bench.settings.topics.metrics, 2)
        if one.key.decode() == records["deep/er/b.pdf"].job_id
    ]
    assert json.loads(metrics.value)["num_generation_tokens"] == records["deep/er/b.pdf"].usage.output_tokens


async def test_an_event_that_leads_to_no_record_is_counted_and_skipped(documents: Documents) -> None:
    bucket = documents.bucket
    put = documents.put("in/a.pdf", receipts_pdf([drawn(1)[0].image]))
    sidecar = documents.s3.client.put_object(
        Bucket=bucket, Key="in/c.pdf", Body=b"{}", Metadata={"nanovllm-source": "x"}
    )
    skipped = [
        event(bucket, "in/gone.pdf", name="ObjectRemoved:Delete"),
        event(bucket, "in/a.pdf", name="ObjectTagging:Put"),
        event(bucket, "elsewhere/a.pdf"),
        event("another-bucket", "in/a.pdf"),
        event(bucket, "in/c.pdf", etag=sidecar["ETag"].strip('"')),
    ]
    await documents.send({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": bucket}, *skipped, put)
    async with documents.working(**documents.settings(receipts_route(bucket))):
        await documents.ended(7)
    assert documents.counted() == {"test": 1, "removed": 1, "other": 1, "no_route": 2, "sidecar": 1, "result": 1}
    await documents.records(1)


async def test_the_newest_version_of_an_object_wins_and_a_late_one_is_superseded(documents: Documents) -> None:
    one, two = (receipts_pdf([receipt.image]) for receipt in drawn(2))
    documents.s3.client.put_bucket_versioning(Bucket=documents.bucket, VersioningConfiguration={"Status": "Enabled"})
    first, second = documents.put("in/a.pdf", one), documents.put("in/a.pdf", two)
    first["s3"]["object"]["sequencer"], second["s3"]["object"]["sequencer"] = "0A", "0B"
    settings = documents.settings(receipts_route(documents.bucket))
    async with documents.working(**settings):
        await documents.send({"Records": [second, first]})
        await documents.ended(2)
        await documents.send(first, second, partition=1)
        await documents.ended(4)
    assert documents.counted() == {"result": 1, "superseded": 2, "same": 1}
    [record] = await documents.records(1)
    assert record.document.version_id == second["s3"]["object"]["versionId"]
    assert record.document.sequencer == "0B"


async def test_an_event_that_names_no_content_is_of_what_is_there(documents: Documents) -> None:
    one, two = (receipts_pdf([receipt.image]) for receipt in drawn(2))
    bare = event(documents.bucket, "in/a.pdf")
    settings = documents.settings(receipts_route(documents.bucket))
    documents.put("in/a.pdf", one)
    async with documents.working(**settings):
        await documents.send(bare, bare)
        await documents.ended(2)
        documents.put("in/a.pdf", two)
        await documents.send(bare)
        await documents.ended(3)
    assert documents.counted() == {"result": 2, "same": 1}
    first, second = await documents.records(2)
    assert first.document.etag is not None
    assert first.document.etag != second.document.etag
    assert first.job_id != second.job_id


@pytest.mark.parametrize("is_long_ago", [True, False], ids=["long ago", "in one second"])
async def test_an_object_that_was_written_again_since_is_source_changed_and_another_entity_tag_is_told(
    documents: Documents, is_long_ago: bool
) -> None:
    first = documents.put("in/a.pdf", b"old")
    second = documents.put("in/a.pdf", receipts_pdf([drawn(1)[0].image]))
    written: datetime = documents.s3.client.head_object(Bucket=documents.bucket, Key="in/a.pdf")["LastModified"]
    first["eventTime"] = (LONG_AGO if is_long_ago else written + timedelta(milliseconds=900)).isoformat()
    strange = documents.put("in/b.pdf", b"%PDF")
    strange["s3"]["object"]["eTag"] = "0" * 32
    strange["eventTime"] = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    await documents.send(first, second, strange)
    async with documents.working(**documents.settings(receipts_route(documents.bucket))):
        await documents.ended(3)
    assert documents.counted() == {"source_changed": 1, "result": 1, "dead_letter": 1}
    [(headers, value)] = await documents.bench.dead_letters(1)
    assert headers["nanovllm_code"] == "object_changed"
    assert json.loads(value) == strange


@pytest.mark.parametrize(
    ("policy", "counted", "code"),
    [
        ("drop", "missing", None),
        ("dead_letter", "dead_letter", "object_not_found"),
        ("retry", "dead_letter", "object_missing"),
    ],
)
async def test_an_object_that_is_gone_is_what_its_route_says(
    documents: Documents, policy: str, counted: str, code: str | None
) -> None:
    await documents.send(event(documents.bucket, "in/a.pdf", etag="0" * 32))
    async with documents.working(**documents.settings(receipts_route(documents.bucket, on_missing=policy))):
        await documents.ended(1)
    assert documents.counted() == {counted: 1}
    if code is not None:
        [(headers, _)] = await documents.bench.dead_letters(1)
        assert headers["nanovllm_code"] == code


async def test_of_several_events_in_a_record_each_has_an_end_of_its_own(documents: Documents) -> None:
    good = documents.put("in/a.pdf", receipts_pdf([drawn(1)[0].image]))
    broken, empty = documents.put("in/b.pdf", b"%PDF-1.7 and nothing else"), documents.put("in/c.pdf", b"")
    await documents.send({"Records": [broken, good, empty, good]}, b"no event")
    async with documents.working(**documents.settings(receipts_route(documents.bucket), delivery="exactly_once")):
        await documents.ended(4)
        letters = await documents.bench.dead_letters(3)
    assert documents.counted() == {"result": 1, "dead_letter": 2, "same": 1}
    codes = {headers["nanovllm_code"]: value for headers, value in letters}
    assert set(codes) == {"invalid_document", "invalid_event"} or len(codes) == 3
    assert json.loads(codes["invalid_document"]) in ({"Records": [broken]}, {"Records": [empty]})
    assert codes["invalid_event"] == b"no event"


async def test_records_that_someone_must_see_go_to_the_review_topic(
    documents: Documents, unique: Callable[[str], str]
) -> None:
    review = unique("review")
    await create_topic(documents.bench.bootstrap_servers, review, partitions=1)
    put = documents.put("in/a.pdf", receipts_pdf([drawn(1)[0].image]))
    route = receipts_route(
        documents.bucket, review_topic=review, on_incomplete="review", sampling={"temperature": 0, "max_tokens": 4}
    )
    await documents.send(put)
    async with documents.working(**documents.settings(route)):
        await documents.ended(1)
        [record] = await documents.records(1, review)
    assert record.pages[0].stop == "length"
    assert record.status == "invalid"


async def test_an_event_beyond_its_deadline_is_a_dead_letter(documents: Documents) -> None:
    put = documents.put("in/a.pdf", receipts_pdf([drawn(1)[0].image]))
    put["eventTime"] = LONG_AGO.isoformat()
    await documents.send(put)
    async with documents.working(**documents.settings(receipts_route(documents.bucket, deadline_s=60))):
        await documents.ended(1)
    [(headers, _)] = await documents.bench.dead_letters(1)
    assert headers["nanovllm_code"] == "deadline_exceeded"


async def test_content_type_and_size_decide_where_a_route_names_them(documents: Documents) -> None:
    body = receipts_pdf([drawn(1)[0].image])
    client, bucket = documents.s3.client, documents.bucket
    for key, content_type in (("in/a.pdf", "application/pdf"), ("in/b.pdf", "text/plain")):
        client.put_object(Bucket=bucket, Key=key, Body=body, ContentType=content_type)
    route = receipts_route(bucket, match={"bucket": bucket, "key": "in/*", "content_type": "application/pdf"})
    await documents.send(event(bucket, "in/a.pdf"), event(bucket, "in/b.pdf"))
    async with documents.working(**documents.settings(route)):
        await documents.ended(2)
    assert documents.counted() == {"result": 1, "no_route": 1}


async def test_a_record_whose_worker_ended_before_it_was_published_is_published_by_its_next_delivery(
    documents: Documents,
) -> None:
    put = documents.put("in/a.pdf", receipts_pdf([drawn(1)[0].image]))
    settings = documents.settings(receipts_route(documents.bucket), page_store=True)
    await documents.send(put, put)
    held = asyncio.Event()

    async def never(*_: Any) -> Any:
        held.set()
        await asyncio.Event().wait()

    with suppress(asyncio.CancelledError):
        async with documents.working(**settings) as (worker, running):
            assert worker.event_stages is not None
            worker.event_stages = replace(worker.event_stages, publish=never)
            async with asyncio.timeout(60):
                await held.wait()
            running.cancel()
    assert documents.s3.client.head_object(Bucket=documents.bucket, Key="in/a.pdf.json")
    async with documents.working(**settings):
        await documents.ended(2)
    assert documents.counted() == {"result": 1, "same": 1}
    [record] = await documents.records(1)
    assert record.pages[0].reused


async def test_a_sidecar_s_missing_bucket_is_waited_for_and_drops_nothing(documents: Documents) -> None:
    put = documents.put("in/a.pdf", receipts_pdf([drawn(1)[0].image]))
    records = f"{documents.bucket}-records"
    route = receipts_route(documents.bucket, sidecar={"place": f"s3://{records}/{{key}}.json"})
    await documents.send(put)
    async with documents.working(**documents.settings(route)) as (worker, _):
        await eventually(lambda: worker.faults.are_present, timeout_s=60)
        assert not documents.counted()
        documents.s3.client.create_bucket(Bucket=records)
        await documents.ended(1)
    assert documents.counted() == {"result": 1}
    assert documents.s3.client.head_object(Bucket=records, Key="in/a.pdf.json")


async def test_a_replayed_event_whose_sidecar_is_there_is_published(documents: Documents) -> None:
    put = documents.put("in/a.pdf", receipts_pdf([drawn(1)[0].image]))
    settings = documents.settings(receipts_route(documents.bucket), page_store=True)
    await documents.send(put)
    async with documents.working(**settings):
        await documents.ended(1)
        await documents.bench.producer.send_and_wait(
            documents.events, json.dumps(put).encode(), partition=1, headers=[("nanovllm_replays", b"1")]
        )
        await documents.ended(2)
    assert documents.counted() == {"result": 2}
    first, second = await documents.records(2)
    assert first.result_id == second.result_id


ROUTES_OF_A_WORKER = """
version: 1
routes:
  - name: receipts
    match: {bucket: inbox, key: "**"}
    prompt: "Extract the fields"
    sidecar: {}
  - name: letters
    match: {bucket: inbox, key: "letters/*"}
    prompt: "Read the letter"
"""


@pytest.mark.parametrize(
    ("routes", "more", "said"),
    [
        (ROUTES_OF_A_WORKER, {}, ["which route receipts (line 4) takes too", "takes: a loop"]),
        ("version: 1\nroutes: []\n", {}, ["routes"]),
        (
            ROUTES_OF_A_WORKER.partition("  - name: letters")[0].replace('"**"', '"in/*.pdf"'),
            {"NANOVLLM_ENGINE__BACKEND": "echo"},
            ["routes need an engine that reads pages; engine.backend is echo"],
        ),
        (
            ROUTES_OF_A_WORKER.partition("  - name: letters")[0].replace('"**"', '"in/*.pdf"')
            + "    result_topic: nanovllm.jobs\n    sampling: {max_tokens: 100000}\n",
            {},
            ["result_topic: the worker uses the topic nanovllm.jobs for something else", "max_tokens"],
        ),
        (None, {}, ["routes.yaml"]),
    ],
)
async def test_a_worker_with_routes_that_cannot_work_ends_before_it_asks_a_broker(
    tmp_path: Path, routes: str | None, more: dict[str, str], said: list[str]
) -> None:
    file = tmp_path / "routes.yaml"
    if routes is not None:
        file.write_text(routes)
    settings = {"NANOVLLM_DOCUMENTS__ROUTES": str(file), "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:9", **more}
    worker = worker_process(tmp_path, settings=settings)
    worker.start()
    await eventually(lambda: not worker.is_running, timeout_s=60)
    assert worker.exit_code == 2, worker.tail()
    log = worker.log.read_text()
    assert "Traceback" not in log
    for one in said:
        assert one in log
