"""Replays of dead letters that are remembered: once each, counted, and whatever the record was."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from bench import Bench, eventually, png, reached
from parts import create_topic
from sample_messages import dead_letter

from nanovllm.cli.main import main
from nanovllm.client import replay
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import FetchFailed, TransientError
from nanovllm.kafka.admin import topic_states
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.messages.base import Source
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.consuming.retry_topics import RetryTopics
from nanovllm.sinks.dead_letter_record import dead_letter_record
from nanovllm.sinks.kafka import send_record

Command = Callable[..., Awaitable[list[dict[str, Any]]]]


def command_on(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    for name, value in bench.environment.items():
        monkeypatch.setenv(name, value)

    async def command(*words: str) -> list[dict[str, Any]]:
        assert await asyncio.to_thread(main, ["dlq", *words]) == 0
        shown = json.loads(capsys.readouterr().out)
        return shown if isinstance(shown, list) else [shown]

    return command


@pytest.fixture
def dlq(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """What ``nanovllm dlq …`` prints as JSON."""
    return command_on(bench, monkeypatch, capsys)


@pytest.fixture
def kafka_dlq(kafka_bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """As ``dlq``, on Apache Kafka."""
    return command_on(kafka_bench, monkeypatch, capsys)


async def bury(
    bench: Bench, job_id: str, offset: int, value: bytes = b"{}", topic: str = "", timestamp_ms: int = 1
) -> None:
    topics = bench.settings.topics
    source = Source(topic=topic or topics.jobs, partition=0, offset=offset, timestamp_ms=timestamp_ms)
    letter = dead_letter(job_id=job_id, source=source)
    record = dead_letter_record(letter, topics.dead_letters, key=b"k", value=value)
    await bench.producer.send_and_wait(record.topic, record.value, key=record.key, headers=list(record.headers))


def states(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["job_id"]: row["state"] for row in rows}


@pytest.mark.kafka
async def test_a_second_replay_of_the_same_selection_does_nothing_until_it_is_told_to(
    kafka_bench: Bench, kafka_dlq: Command
) -> None:
    bench, topics = kafka_bench, kafka_bench.settings.topics
    names = (topics.dead_letters, topics.replayed)
    await bury(bench, "a", 1, b'"a"')
    await bury(bench, "b", 2, b'"b"')
    assert set(states(await kafka_dlq("replay", "--all", "--dry-run", "--json")).values()) == {"would be replayed"}
    assert set(await topic_states(bench.settings.kafka, names)) == {topics.dead_letters}

    assert states(await kafka_dlq("replay", "--job-id", "a", "--json")) == {"a": "replayed"}
    made = (await topic_states(bench.settings.kafka, names))[topics.replayed]
    assert made.configs["cleanup.policy"] == "compact"
    dry = await kafka_dlq("replay", "--all", "--dry-run", "--json")
    assert states(dry) == {"a": "skipped", "b": "would be replayed"}
    assert states(await kafka_dlq("replay", "--all", "--json")) == {"a": "skipped", "b": "replayed"}
    for _ in range(2):
        rows = await kafka_dlq("replay", "--all", "--json")
        assert {row["state"] for row in rows} == {"skipped"}
        assert all(row["reason"].startswith("replayed at 20") for row in rows)
    assert await sent(bench) == [b'"a"', b'"b"']

    again = await kafka_dlq("replay", "--job-id", "b", "--again", "--dry-run", "--json")
    assert states(again) == {"b": "would be replayed"}
    assert states(await kafka_dlq("replay", "--job-id", "b", "--again", "--json")) == {"b": "replayed"}
    assert await sent(bench) == [b'"a"', b'"b"', b'"b"']
    assert states(await kafka_dlq("replay", "--all", "--json")) == {"a": "skipped", "b": "skipped"}


async def sent(bench: Bench) -> list[bytes]:
    """The values of all jobs, in the order of their times."""
    count = await bench.ends(0) + await bench.ends(1)
    records = await bench.read(bench.settings.topics.jobs, count)
    return [record.value for record in sorted(records, key=lambda record: (record.timestamp, record.offset))]


@pytest.mark.kafka
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_each_failure_after_a_replay_is_one_dead_letter_that_counts_it_and_an_answer_ends_it(
    kafka_bench: Bench, kafka_dlq: Command, s3: Any, delivery: str
) -> None:
    bench, bucket = kafka_bench, s3.make_bucket()
    allowed = bench.settings.s3.model_copy(update={"allow": (f"s3://{bucket}",)})
    await bench.send({"job_id": "r", "prompt": "<|image|>", "images": [f"s3://{bucket}/late.png"]}, key=b"k")
    async with bench.working(EchoEngine(), s3=allowed, delivery=delivery):
        for replays in range(1, 3):
            letters = await bench.dead_letters(replays)
            assert [letter.get("nanovllm_replays") for letter, _ in letters] == [None, "1", "2"][:replays]
            rows = await kafka_dlq("replay", "--code", "object_not_found", "--json")
            assert [row["state"] for row in rows] == ["skipped"] * (replays - 1) + ["replayed"]
        letters = await bench.dead_letters(3)
        assert [row["replays"] for row in await kafka_dlq("list", "--json")] == [0, 1, 2]
        s3.put(bucket, "late.png", png())
        rows = await kafka_dlq("replay", "--all", "--json")
        assert [row["state"] for row in rows] == ["skipped", "skipped", "replayed"]
        (result,) = await bench.read(bench.settings.topics.results, 1)
        (metrics,) = await bench.read(bench.settings.topics.metrics, 1)
        rows = await kafka_dlq("replay", "--all", "--json")
        assert [row["state"] for row in rows] == ["skipped"] * 3
    assert len(await sent(bench)) == 4
    for record in (result, metrics):
        assert "replays" not in str((record.headers, record.value))
    assert (await kafka_dlq("show", rows[-1]["place"]))[0]["replays"] == 2
    assert "replays" not in (await kafka_dlq("show", rows[0]["place"]))[0]


@pytest.mark.kafka
async def test_a_tombstone_is_replayed_as_a_tombstone(kafka_bench: Bench, kafka_dlq: Command) -> None:
    bench = kafka_bench
    buried = bench.settings.dead_letters.model_copy(update={"tombstones": True})
    for key in (b"a", b"b"):  # two alike in one batch, and beside them a value that is empty
        await bench.producer.send_and_wait(bench.settings.topics.jobs, None, key=key, partition=0)
    await bench.send(b"", key=b"c")
    async with bench.working(EchoEngine(), dead_letters=buried):
        await eventually(lambda: reached(bench, 3))
    letters = await bench.read(bench.settings.topics.dead_letters, 3)
    values = {b"a": None, b"b": None, b"c": b""}
    assert {letter.key: letter.value for letter in letters} == values
    rows = await kafka_dlq("replay", "--all", "--json")
    assert [row["state"] for row in rows] == ["replayed"] * 3
    jobs = await bench.read(bench.settings.topics.jobs, 6)
    replayed = [record for record in jobs if record.headers]
    assert {record.key: record.value for record in replayed} == values
    place = next(f"{letter.partition}:{letter.offset}" for letter in letters if letter.key == b"a")
    assert (await kafka_dlq("show", place))[0]["value_bytes"] is None


@pytest.mark.kafka
@pytest.mark.parametrize("limit", ["topic", "producer"])
async def test_what_is_too_large_is_skipped_and_the_others_go_on(
    kafka_bench: Bench,
    kafka_dlq: Command,
    unique: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
) -> None:
    bench, topic = kafka_bench, unique("small")
    small = {"max.message.bytes": "2000"}
    await create_topic(bench.bootstrap_servers, topic, partitions=1, settings=small if limit == "topic" else {})
    if limit == "producer":
        monkeypatch.setenv("NANOVLLM_KAFKA__MAX_REQUEST_BYTES", "2000")
    sizes = [10, 5_000, 11, 5_001, 5_002, 12]
    for offset, size in enumerate(sizes):
        await bury(bench, str(size), offset, b"x" * size, topic)
    for expected in ("replayed", "skipped"):
        rows = await kafka_dlq("replay", "--all", "--topic", topic, "--json")
        assert [row["state"] for row in rows] == ["skipped" if size > 2_000 else expected for size in sizes]
        assert all("of this size" in row["reason"] for row in rows if int(row["job_id"]) > 2_000)
    assert [len(record.value) for record in await bench.read(topic, 3)] == [10, 11, 12]


async def test_a_replay_that_breaks_off_is_taken_up_where_it_stopped(
    bench: Bench, dlq: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sends = 0

    async def breaks_off(producer: Any, record: OutgoingRecord) -> Any:
        nonlocal sends
        sends += 1
        if sends == 4:  # each is sent with its mark behind it
            raise TransientError("the mark of the second one could not be written")
        return await send_record(producer, record)

    for offset, job_id in enumerate("abc"):
        await bury(bench, job_id, offset, job_id.encode())
    with monkeypatch.context() as broken:
        broken.setattr(replay, "send_record", breaks_off)
        assert await asyncio.to_thread(main, ["dlq", "replay", "--all"]) == 1
    assert not [record for record in caplog.records if record.name == "asyncio"]
    assert states(await dlq("replay", "--all", "--json")) == {"a": "skipped", "b": "replayed", "c": "replayed"}
    # The one without a mark was sent twice.
    assert await sent(bench) == [b"a", b"b", b"b", b"c"]


async def test_a_mark_that_was_deleted_and_a_record_that_is_no_mark_hold_nothing_back(
    bench: Bench, dlq: Command
) -> None:
    await bury(bench, "a", 1)
    assert states(await dlq("replay", "--all", "--json")) == {"a": "replayed"}
    replayed = bench.settings.topics.replayed
    (mark,) = await bench.read(replayed, 1)
    assert json.loads(mark.value)["dead_letter"].endswith(":0")
    await bench.producer.send_and_wait(replayed, None, key=mark.key)
    await bench.producer.send_and_wait(replayed, b"somebody else's record", key=mark.key)
    assert states(await dlq("replay", "--all", "--json")) == {"a": "replayed"}


async def test_a_topic_that_was_made_anew_has_other_records_at_the_same_offsets(bench: Bench, dlq: Command) -> None:
    await bury(bench, "before", 1, timestamp_ms=1)
    assert states(await dlq("replay", "--all", "--json")) == {"before": "replayed"}
    await bury(bench, "after", 1, timestamp_ms=2)
    assert states(await dlq("replay", "--all", "--json")) == {"before": "skipped", "after": "replayed"}


@pytest.mark.parametrize(
    ("header", "replays"),
    [(b"1", 1), (b"9999", 9999), (b"0", 0), (b"", 0), (b"-1", 0), (b"10000", 0), (b" 1", 0), (b"1_0", 0), (b"\xb2", 0)],
)
def test_the_count_of_replays_is_a_small_number_and_outlives_delayed_retries(header: bytes, replays: int) -> None:
    topics = RetryTopics({"jobs": 0}, (60,))
    ledger = PartitionLedger(0, max_out_of_order=1)
    headers = (("tenant", b"acme"), ("nanovllm_replays", header))
    origin = topics.origin_of(ConsumedRecord("jobs", 0, 7, 1, b"k", b"{}", headers, ledger=ledger))
    assert (origin.replays, origin.headers) == (replays, (("tenant", b"acme"),))
    carried = origin.retry_headers(1, datetime.now(UTC), FetchFailed("503"))
    assert any(name == "nanovllm_replays" for name, _ in carried) == (replays > 0)
    waited = topics.origin_of(ConsumedRecord("jobs.retry-60s", 0, 3, 2, b"k", b"{}", carried, ledger=ledger))
    assert (waited.replays, waited.source.offset) == (replays, 7)
