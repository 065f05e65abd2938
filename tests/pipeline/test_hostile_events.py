"""Events that nobody should send, and stores that fail: each event ends with a code of its own, and work goes on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import pytest
from bench import Bench, eventually
from document_bench import Documents, event
from document_files import drawn, receipts_pdf
from parts import Fault, FaultProxy, VersityNode, create_topic
from pdf_files import PROSE, text_pdf

from nanovllm.pipeline.failure.bucket_holds import REFUSED_OBJECTS
from nanovllm.settings.engine import EngineSettings

ECHO = EngineSettings(backend="echo")
DELIVERIES = ("at_least_once", "exactly_once")
CLEAN = text_pdf(PROSE)

LONGEST = "in/" + "/".join(["k" * 198] * 5)  # 1,024 bytes with what its record has around it
KEYS = (
    "in/a b.pdf",
    "in/a+b.pdf",
    "in/ü日本😀.pdf",
    "in/a%20b%2Fc%.pdf",
    "in/x:y/z.pdf",
    "in/a/deep/er/prefix/b.pdf",
    "in/&<>\"'=?#.pdf",
    "in/tab\tand\x01\x7f.pdf",
    LONGEST,
)


def text_route(bucket: str, **fields: Any) -> dict[str, Any]:
    """A route that asks no engine for clean pages."""
    return {
        "name": "texts",
        "match": {"bucket": bucket, "key": "in/**"},
        "prompt": "Read the page.",
        "text": "only_if_clean",
        "sidecar": {"place": f"s3://{bucket}/out/{{bucket}}/{{key}}.json"},
        **fields,
    }


def hostile(documents: Documents, gone: str) -> dict[str, tuple[dict[str, Any] | bytes, str]]:
    """Messages by name, each with the code of its dead letter, or what it is counted as; the bucket ``gone`` is."""
    bucket = documents.bucket

    def of(key: str, code: str, /, bucket: str = bucket, **fields: Any) -> tuple[dict[str, Any], str]:
        one = event(bucket, key)
        one["s3"]["object"] |= fields
        return one, code

    def at(key: str, time: str, code: str) -> tuple[dict[str, Any], str]:
        return documents.put(key, CLEAN) | {"eventTime": time}, code

    deep = b'{"Records": [' * 40_000
    return {
        "a key of 1,025 bytes": of("in/" + "k" * 1022, "invalid_event"),
        "a key whose sidecar has none": of("in/" + "k" * 1021, "invalid_input"),
        "a key with NUL": of("in/\0.pdf", "invalid_event"),
        "a key of another encoding": of("in/", "invalid_event", key="in/%ff.pdf"),
        "a key out of its prefix": of("in/../out/in/taken.pdf", "forbidden_uri"),
        "a key with a dot": of("in/./a.pdf", "forbidden_uri"),
        "a key that is a number": of("in/", "invalid_event", key=1),
        "a bucket without a name": of("in/a.pdf", "invalid_event", bucket=""),
        "a bucket with a slash": of("in/a.pdf", "no_route", bucket=f"{bucket}/in"),
        "a bucket with dots": of("in/a.pdf", "no_route", bucket=".."),
        "a bucket of 10 KB": of("in/a.pdf", "no_route", bucket="b" * 10_000),
        "a bucket that was deleted": of("in/a.pdf", "object_not_found", bucket=gone),
        "any entity tag": of("in/a.pdf", "invalid_event", eTag="*"),
        "an entity tag with spaces": of("in/a.pdf", "invalid_event", eTag="a b"),
        "an entity tag of 10 KB": of("in/a.pdf", "invalid_event", eTag="0" * 10_000),
        "a version of 10 KB": of("in/a.pdf", "invalid_event", versionId="v" * 10_000),
        "a version that is none": of("in/a.pdf", "object_not_found", versionId="v" * 1_000),
        "a size below zero": of("in/a.pdf", "invalid_event", size=-1),
        "a size of 100 digits": of("in/a.pdf", "invalid_event", size="9" * 100),
        "a size beyond 2^53": of("in/a.pdf", "invalid_event", size=2**60),
        "a size of 9 petabytes": of("in/nothing.pdf", "object_not_found", size=2**53),
        "half a character": of("in/a.pdf", "invalid_event", sequencer="\ud800"),
        "a sidecar's place that is taken": (documents.put("in/taken.pdf", CLEAN), "sidecar_taken"),
        "the first day, in the east": at("in/1.pdf", "0001-01-01T00:00:00+14:00", "invalid_event"),
        "the last day, in the west": at("in/2.pdf", "9999-12-31T23:59:59-14:00", "invalid_event"),
        "the last day": at("in/3.pdf", "9999-12-31T23:59:59Z", "result"),
        "the first day": at("in/4.pdf", "0001-01-01T00:00:00Z", "deadline_exceeded"),
        "a record of no event": (b"\x00" * 100, "invalid_event"),
        "a record of two million brackets": (b"[" * 1_000_000, "invalid_event"),
        "a record of 40,000 levels": (deep, "invalid_event"),
        "a number beyond all": (
            json.dumps(event(bucket, "in/a.pdf")).replace("{", '{"n": 1e999, ', 1).encode(),
            "invalid_event",
        ),
        "an event beside a number": (json.dumps([event(bucket, "in/a.pdf"), 1]).encode(), "invalid_event"),
        "1,001 events": (json.dumps({"Records": [event(bucket, "no/a.pdf")] * 1_001}).encode(), "invalid_event"),
    }


@pytest.mark.parametrize("delivery", DELIVERIES)
async def test_a_hostile_event_ends_with_a_code_of_its_own_and_the_next_has_its_record(
    documents: Documents, delivery: str
) -> None:
    documents.s3.put(documents.bucket, f"out/{documents.bucket}/in/taken.pdf.json", b"somebody's")
    gone = documents.s3.make_bucket()
    documents.s3.client.delete_bucket(Bucket=gone)
    messages = hostile(documents, gone)
    route = text_route(documents.bucket, match={"bucket": [documents.bucket, gone], "key": "in/**"}, deadline_s=3600)
    await documents.send(*(message for message, _ in messages.values()), documents.put("in/good.pdf", CLEAN))
    outcomes = Counter(outcome for _, outcome in messages.values())
    letters = sum(number for outcome, number in outcomes.items() if outcome not in ("no_route", "result"))
    async with documents.working(**documents.settings(route, engine=ECHO, delivery=delivery)):
        found = await documents.bench.dead_letters(letters)
        records = await documents.records(1 + outcomes["result"])
    assert f"s3://{documents.bucket}/in/good.pdf" in {record.document.uri for record in records}
    names = list(messages)  # in the order of their offsets
    codes = {names[int(headers["nanovllm_source_offset"])]: headers["nanovllm_code"] for headers, _ in found}
    expected = {name: outcome for name, (_, outcome) in messages.items() if outcome not in ("no_route", "result")}
    assert codes == expected
    assert documents.counted()["no_route"] == outcomes["no_route"]
    assert await documents.bench.committed(topic=documents.events) == len(messages) + 1


@pytest.mark.parametrize("delivery", DELIVERIES)
async def test_each_key_that_s3_takes_has_a_record(documents: Documents, delivery: str) -> None:
    sent = [documents.put(key, CLEAN) for key in KEYS]
    await documents.send({"Records": sent[:4]}, *sent[4:])
    async with documents.working(
        **documents.settings(text_route(documents.bucket), engine=ECHO, delivery=delivery)
    ) as (worker, _):
        await documents.ended(len(KEYS))
        assert worker.engine.stats().steps == 0
    assert documents.counted() == {"result": len(KEYS)}
    records = await documents.records(len(KEYS))
    assert {record.document.uri for record in records} == {f"s3://{documents.bucket}/{key}" for key in KEYS}
    for key in KEYS:
        assert documents.s3.client.head_object(Bucket=documents.bucket, Key=f"out/{documents.bucket}/{key}.json")


@pytest.mark.parametrize("delivery", DELIVERIES)
async def test_each_of_a_thousand_events_in_one_record_has_an_end(documents: Documents, delivery: str) -> None:
    good, again = documents.put("in/a.pdf", CLEAN), documents.put("in/b.pdf", CLEAN)
    missing = [event(documents.bucket, f"in/{number}.pdf") for number in range(4)]
    others = [event(documents.bucket, f"elsewhere/{number}.pdf") for number in range(993)]
    await documents.send({"Records": [good, *missing, *others, good, again]})
    async with documents.working(**documents.settings(text_route(documents.bucket), engine=ECHO, delivery=delivery)):
        await documents.ended(1_000)
        letters = await documents.bench.dead_letters(4)
    assert documents.counted() == {"result": 2, "same": 1, "dead_letter": 4, "no_route": 993}
    assert {json.loads(value)["Records"][0]["s3"]["object"]["key"] for _, value in letters} == {
        f"in/{number}.pdf" for number in range(4)
    }


# HEAD of the object and of its sidecar, GET of the object, GET and PUT of its page, PUT of its sidecar.
REQUESTS = 6


@pytest.mark.parametrize("delivery", DELIVERIES)
async def test_faults_of_the_store_at_any_request_of_a_document_drop_nothing(
    documents: Documents, delivery: str
) -> None:
    spoiled: list[Fault | None] = []
    for number in range(REQUESTS):
        spoiled += [None] * number + ["unavailable", "refuse", "unavailable"] + [None] * (REQUESTS - number)
    route = text_route(documents.bucket, match={"bucket": documents.bucket, "key": "in/**", "content_type": "*/*"})
    async with FaultProxy(documents.s3.endpoint_url, spoiled) as proxy:
        s3 = documents.bench.settings.s3.model_copy(update={"endpoint_url": proxy.url, "allow": ()})
        settings = documents.settings(route, page_store=True, engine=ECHO, delivery=delivery, s3=s3)
        async with documents.working(**settings):
            for number, receipt in enumerate(drawn(REQUESTS), 1):
                await documents.send(documents.put(f"in/{number}.pdf", receipts_pdf([receipt.image])))
                await documents.ended(number)
        assert proxy.faults_left == 0
    assert documents.counted() == {"result": REQUESTS}
    assert len({record.job_id for record in await documents.records(REQUESTS)}) == REQUESTS


async def test_an_outage_of_the_store_stops_the_intake_of_events(documents: Documents) -> None:
    sent = [documents.put(f"in/{number}.pdf", CLEAN) for number in range(30)]
    async with FaultProxy(documents.s3.endpoint_url, ["unavailable"] * 10_000) as proxy:
        s3 = documents.bench.settings.s3.model_copy(update={"endpoint_url": proxy.url, "allow": (), "max_attempts": 20})
        settings = documents.settings(text_route(documents.bucket), engine=ECHO, s3=s3)
        await documents.send(*sent)
        async with documents.working(**settings) as (worker, _):
            await eventually(lambda: worker.faults.are_present)
            assert "object store" in "".join(worker.health.unready)
            proxy.heal()
            await documents.ended(len(sent))
    assert documents.counted() == {"result": len(sent)}


async def test_a_bucket_that_refuses_every_head_is_held_back(documents: Documents) -> None:
    for number in range(30):
        documents.put(f"in/{number}.pdf", CLEAN)
    async with FaultProxy(documents.s3.endpoint_url, ["forbidden"] * 10_000) as proxy:
        s3 = documents.bench.settings.s3.model_copy(update={"endpoint_url": proxy.url, "allow": ()})
        # Without an entity tag: the store is asked what is there.
        await documents.send(*(event(documents.bucket, f"in/{number}.pdf") for number in range(30)))
        async with documents.working(**documents.settings(text_route(documents.bucket), engine=ECHO, s3=s3)) as at_work:
            await eventually(lambda: at_work[0].health.held_buckets)
            proxy.heal()
            await documents.ended(30)
    assert documents.counted() == {"dead_letter": REFUSED_OBJECTS - 1, "result": 31 - REFUSED_OBJECTS}


@pytest.mark.parametrize("delivery", DELIVERIES)
async def test_a_page_store_s_missing_bucket_is_waited_for(documents: Documents, delivery: str) -> None:
    sent = [documents.put(f"in/{number}.pdf", receipts_pdf([drawn(1)[0].image])) for number in range(3)]
    settings = documents.settings(text_route(documents.bucket), engine=ECHO, delivery=delivery)
    kept = f"{documents.bucket}-pages"
    routes = settings["documents"].routes
    routes.write_text(f"page_store: s3://{kept}/pages\n{routes.read_text()}")
    await documents.send(*sent)
    async with documents.working(**settings) as (worker, _):
        await eventually(lambda: worker.faults.are_present)
        assert "page store" in "".join(worker.health.unready)
        assert not documents.counted()
        documents.s3.client.create_bucket(Bucket=kept)
        await documents.ended(len(sent))
        await eventually(lambda: not worker.faults.are_present)
    assert documents.counted() == {"result": len(sent)}
    assert documents.s3.client.list_objects_v2(Bucket=kept)["KeyCount"] == 1


NO_OBJECTS = {
    "in/../in/a+b.pdf": "forbidden_uri",
    "in/./a+b.pdf": "forbidden_uri",
    f"in/{'k' * 300}.pdf": "object_refused",  # longer than the name of a file: HEAD says 400, and no more
    "in/a+b.pdf/below a file.pdf": "object_not_found",
    "in/\\\n .pdf ": "object_not_found",
}


@pytest.mark.s3
@pytest.mark.kafka
@pytest.mark.parametrize("delivery", DELIVERIES)
async def test_each_key_of_a_real_s3_server_has_a_record_by_its_own_notification(
    kafka_bench: Bench, unique: Callable[[str], str], tmp_path: Path, delivery: str
) -> None:
    events = unique("events")
    await create_topic(kafka_bench.bootstrap_servers, events, partitions=2)
    node = VersityNode(tmp_path, notifies=(kafka_bench.bootstrap_servers, events))
    try:
        s3 = node.start()
        documents = Documents(kafka_bench, s3, s3.make_bucket(versioned=True), events, tmp_path)
        client = kafka_bench.settings.s3.model_copy(update={"endpoint_url": s3.endpoint_url, "allow": ()})
        settings = documents.settings(text_route(documents.bucket), engine=ECHO, delivery=delivery, s3=client)
        no_objects = [event(documents.bucket, key) for key in NO_OBJECTS]
        async with documents.working(**settings):
            await documents.send(*no_objects)
            for key in KEYS:
                documents.put(key, CLEAN)
            records = await documents.records(len(KEYS))
            letters = await documents.bench.dead_letters(len(no_objects))
        assert {record.document.uri for record in records} == {f"s3://{documents.bucket}/{key}" for key in KEYS}
        found = {unquote_plus(json.loads(value)["s3"]["object"]["key"]): headers for headers, value in letters}
        assert {key: headers["nanovllm_code"] for key, headers in found.items()} == NO_OBJECTS
        assert documents.counted()["result"] == len(KEYS)
        for key in KEYS:
            assert s3.client.head_object(Bucket=documents.bucket, Key=f"out/{documents.bucket}/{key}.json")
    finally:
        node.stop()
