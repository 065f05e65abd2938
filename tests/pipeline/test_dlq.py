"""Dead letters that can be understood and replayed: written by a real worker, read by the command line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bench import Bench, FaultyFetcher, eventually, png, reached
from parts import create_topic
from sample_messages import dead_letter

from nanovllm.cli.main import main
from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import FetchFailed, PoisonLimitReached
from nanovllm.messages.base import Source
from nanovllm.pipeline.stages.failure import DeadLetterLimit
from nanovllm.sinks.dead_letter_record import dead_letter_record

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def environment(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line's settings are the bench's."""
    for name, value in bench.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "200")


async def command(capsys: Capture, *words: str) -> Any:
    """What ``nanovllm dlq …`` prints as JSON; it runs in a thread, where it may have an event loop of its own."""
    assert await asyncio.to_thread(main, ["dlq", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[0]) if len(lines) == 1 else [json.loads(line) for line in lines]


async def bury(bench: Bench, **changes: Any) -> None:
    value = changes.pop("value", b"{}")
    record = dead_letter_record(dead_letter(**changes), bench.settings.topics.dead_letters, key=b"k", value=value)
    await bench.producer.send_and_wait(record.topic, record.value, key=record.key, headers=list(record.headers))


async def test_letters_are_found_by_what_they_say(bench: Bench, environment: None, capsys: Capture) -> None:
    now = datetime.now(UTC)
    kinds: dict[str, dict[str, Any]] = {
        "image": {"code": "invalid_image", "error_class": "invalid", "stage": "prepare"},
        "gone": {"code": "object_not_found", "error_class": "permanent", "stage": "fetch", "retryable": True},
        "old": {"code": "object_not_found", "error_class": "permanent", "stage": "fetch"},
    }
    for job_id, kind in kinds.items():
        await bury(bench, job_id=job_id, failed_at=now - timedelta(hours=5 if job_id == "old" else 0), **kind)
    await bench.producer.send_and_wait(bench.settings.topics.dead_letters, b"somebody else's record")

    async def found(*words: str) -> set[str]:
        return {row["job_id"] for row in await command(capsys, "list", "--json", *words)}

    assert await found() == {"image", "gone", "old"}
    assert await found("--code", "object_not_found") == {"gone", "old"}
    assert await found("--class", "invalid") == {"image"}
    assert await found("--stage", "fetch", "--since", "1h") == {"gone"}
    assert await found("--until", (now - timedelta(hours=1)).isoformat()) == {"old"}
    assert await found("--retryable") == {"gone"}
    assert await found("--job-id", "image", "--job-id", "old") == {"image", "old"}
    counts = await command(capsys, "list", "--count", "--json")
    assert {(row["code"], row["count"]) for row in counts} == {("object_not_found", 2), ("invalid_image", 1)}
    assert await asyncio.to_thread(main, ["dlq", "list", "--class", "nonsense"]) == 2
    assert await asyncio.to_thread(main, ["dlq", "list", "--since", "yesterday-ish"]) == 2


def test_an_unknown_code_is_refused_with_the_codes_nearest_to_it(capsys: Capture) -> None:
    for words, nearest in (
        (["list", "--code", "object_not_fuond"], "object_not_found"),
        (["replay", "--code", "invalid_job", "--code", "forbiden_url"], "forbidden_uri"),
        (["list", "--code", "nonsense"], ""),
    ):
        assert main(["dlq", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words[-1] in line
        assert "nearest: " + nearest in line


async def test_a_key_that_no_setting_allows_is_not_retryable(bench: Bench, environment: None, capsys: Capture) -> None:
    for job_id, key in (
        ("outside", "s3://other/a.png"),
        ("dots", "s3://images/in/../a.png"),
        ("dot", "s3://images/./a"),
    ):
        await bench.send({"job_id": job_id, "prompt": "<|image|>", "images": [key]})
    async with bench.working(EchoEngine()):
        await bench.dead_letters(3)
    said = {}
    for job_id in ("outside", "dots", "dot"):
        letter = await command(capsys, "show", job_id)
        said[job_id] = letter["code"], letter["retryable"]
    assert said == {
        "outside": ("forbidden_uri", True),
        "dots": ("forbidden_uri", False),
        "dot": ("forbidden_uri", False),
    }
    rows = await command(capsys, "replay", "--code", "forbidden_uri", "--retryable", "--dry-run", "--json")
    assert [row["job_id"] for row in rows] == ["outside"]


async def test_a_job_that_was_repaired_is_replayed_as_it_was(
    bench: Bench, environment: None, capsys: Capture, s3: Any
) -> None:
    bucket = s3.make_bucket()
    settings = bench.settings.model_copy(
        update={
            "s3": bench.settings.s3.model_copy(update={"allow": (f"s3://{bucket}",)}),
            "dead_letters": bench.settings.dead_letters.model_copy(update={"keep_headers": ("tenant",)}),
        }
    )
    job = json.dumps({"job_id": "r-1", "prompt": "<|image|>", "images": [f"s3://{bucket}/late.png"]}, indent=3).encode()
    headers = [("traceparent", b"00-ab"), ("Tenant", b"acme"), ("authorization", b"Bearer hunter2")]
    await bench.send(job, key=b"\x00key\xff", headers=headers)
    changes = {"s3": settings.s3, "dead_letters": settings.dead_letters}
    async with bench.working(EchoEngine(), **changes):
        ((letter, _),) = await bench.dead_letters(1)
        assert (letter["nanovllm_code"], letter["nanovllm_retryable"]) == ("object_not_found", "true")
        assert letter["nanovllm_cause"] == "NoSuchKey"

        dry = await command(capsys, "replay", "--retryable", "--dry-run", "--json")
        assert [row["state"] for row in dry] == ["would be replayed"]
        assert await bench.ends() == 1

        s3.put(bucket, "late.png", png())
        assert [row["state"] for row in await command(capsys, "replay", "--job-id", "r-1", "--json")] == ["replayed"]
        assert set(await bench.results(1)) == {"r-1"}
    records = await bench.read(bench.settings.topics.jobs, 2)
    original, again = sorted(records, key=lambda record: record.timestamp)
    assert (again.key, again.value) == (original.key, original.value)
    assert dict(again.headers) == {"traceparent": b"00-ab", "Tenant": b"acme", "nanovllm_replays": b"1"}


async def test_a_replayed_job_is_its_tenants_though_no_header_is_listed(
    bench: Bench, environment: None, capsys: Capture, s3: Any
) -> None:
    bucket = s3.make_bucket()
    tenants = bench.settings.tenants.model_copy(update={"header": "tenant"})
    allowed = bench.settings.s3.model_copy(update={"allow": (f"s3://{bucket}",)})
    headers = [("cookie", b"hunter2"), ("Tenant", b"acme")]
    await bench.send({"job_id": "late", "prompt": "<|image|>", "images": [f"s3://{bucket}/late.png"]}, headers=headers)
    await bench.send(b"no job", headers=headers)
    async with bench.working(EchoEngine(), tenants=tenants, s3=allowed):
        letters = await bench.dead_letters(2)
        s3.put(bucket, "late.png", png())
        await command(capsys, "replay", "--all", "--json")
        assert set(await bench.results(1)) == {"late"}
    assert [letter["Tenant"] for letter, _ in letters] == ["acme"] * 2
    again = [dict(record.headers) for record in await bench.read(bench.settings.topics.jobs, 4)]
    assert [one["Tenant"] for one in again] == [b"acme"] * 4
    assert [one for one in again if "nanovllm_replays" in one] == [{"Tenant": b"acme", "nanovllm_replays": b"1"}] * 2


async def test_nothing_is_replayed_unasked_twice_or_into_a_topic_that_only_the_letter_names(
    bench: Bench, environment: None, capsys: Capture
) -> None:
    jobs = bench.settings.topics.jobs
    assert await asyncio.to_thread(main, ["dlq", "replay"]) == 2
    capsys.readouterr()
    for offset in (3, 3):
        await bury(bench, job_id="twice", source=Source(topic=jobs, partition=0, offset=offset), value=b"{1}")
    await bury(bench, job_id="elsewhere", source=Source(topic="payments", partition=0, offset=1))
    rows = await command(capsys, "replay", "--all", "--json")
    assert sorted((row["job_id"], row["state"]) for row in rows) == [
        ("elsewhere", "skipped"),
        ("twice", "replayed"),
        ("twice", "skipped"),
    ]
    assert [record.value for record in await bench.read(jobs, 1)] == [b"{1}"]


async def test_an_event_is_replayed_by_default_where_workers_read_events(
    bench: Bench, environment: None, unique: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    events = unique("events")
    await create_topic(bench.bootstrap_servers, events)
    monkeypatch.setenv("NANOVLLM_TOPICS__EVENTS", events)
    await bury(bench, job_id="e", source=Source(topic=events, partition=0, offset=1), value=b"an event")
    assert [row["state"] for row in await command(capsys, "replay", "--all", "--json")] == ["skipped"]
    monkeypatch.setenv("NANOVLLM_DOCUMENTS__ROUTES", "routes.yaml")
    assert [row["state"] for row in await command(capsys, "replay", "--all", "--json")] == ["replayed"]
    assert [record.value for record in await bench.read(events, 1)] == [b"an event"]


async def test_a_letter_that_was_cut_is_replayed_from_its_source(
    bench: Bench, environment: None, capsys: Capture
) -> None:
    whole = b"{" + b" " * 5_000 + b"}"
    await bench.send(b"before", whole)
    topics = bench.settings.topics
    for offset in (0, 1):
        letter = dead_letter(job_id=str(offset), source=Source(topic=topics.jobs, partition=0, offset=offset))
        record = dead_letter_record(letter, topics.dead_letters, key=b"k", value=whole, max_bytes=2_000)
        await bench.producer.send_and_wait(record.topic, record.value, key=record.key, headers=list(record.headers))
    rows = await command(capsys, "replay", "--all", "--json")
    assert {row["job_id"]: row["state"] for row in rows} == {"0": "skipped", "1": "replayed"}
    sent = await bench.read(topics.jobs, 3)
    assert [record.value for record in sent].count(whole) == 2


async def test_show_tells_all_but_the_message_and_the_values_of_headers(
    bench: Bench, environment: None, capsys: Capture
) -> None:
    letter = dead_letter(job_id="r-9", cause="ReadTimeoutError")
    record = dead_letter_record(
        letter,
        bench.settings.topics.dead_letters,
        key=b"k",
        value=b'{"token": "hunter2"}',
        original_headers=(("tenant", b"hunter2"),),
        keep_headers=("tenant",),
    )
    await bench.producer.send_and_wait(record.topic, record.value, key=record.key, headers=list(record.headers))
    shown = await command(capsys, "show", "r-9")
    assert shown["headers"] == ["tenant"]
    assert (shown["cause"], shown["value_bytes"]) == ("ReadTimeoutError", 20)
    assert "hunter2" not in json.dumps(shown)
    assert await command(capsys, "show", shown["place"], "--value") == {"token": "hunter2"}
    assert await asyncio.to_thread(main, ["dlq", "show", "nobody"]) == 2


async def test_a_fault_of_the_worker_itself_is_named_with_its_place_and_nothing_else(bench: Bench) -> None:
    def fault(request: Request) -> BaseException:
        return KeyError("hunter2")

    await bench.send({"job_id": "j", "prompt": "p"})
    async with bench.working(EchoEngine(fault=fault)):
        ((headers, _),) = await bench.dead_letters(1)
    assert headers["nanovllm_code"] == "internal"
    assert headers["nanovllm_cause"].startswith("KeyError in nanovllm.")
    assert "hunter2" not in json.dumps(headers)


async def test_the_poison_limit_ends_the_worker_before_one_more_is_buried(bench: Bench) -> None:
    limited = bench.settings.dead_letters.model_copy(update={"poison_limit": 3})
    await bench.send(*[b"poison"] * 2, {"job_id": "good", "prompt": "p"})
    async with bench.working(EchoEngine(), dead_letters=limited) as (_, running):
        await bench.results(1)
        assert not running.done()
        await bench.send(*[b"poison"] * 9)
        with pytest.raises(PoisonLimitReached, match="poison_limit"):
            await running
    letters = len(await bench.dead_letters(5))
    assert letters == 5
    assert (await bench.committed() or 0) < 12
    async with bench.working(EchoEngine()):
        await eventually(lambda: reached(bench, 12))


def test_an_answer_between_them_resets_the_count() -> None:
    limit = DeadLetterLimit(1)
    limit.count()
    limit.reset()
    limit.count()
    with pytest.raises(PoisonLimitReached):
        limit.count()
    DeadLetterLimit(None).count()


async def test_the_innermost_error_is_the_cause(bench: Bench) -> None:
    error = FetchFailed("the object store broke off")
    error.__cause__ = ConnectionResetError("10.0.0.1")
    fetcher = FaultyFetcher(bench.settings, error)
    await bench.send({"job_id": "j", "prompt": "<|image|>", "images": ["s3://images/x.png"]})
    async with bench.working(EchoEngine(), fetcher):
        ((headers, _),) = await bench.dead_letters(1)
    assert headers["nanovllm_cause"] == "ConnectionResetError"
    assert headers["nanovllm_class"] == "retries_exhausted"


async def test_a_replay_waits_between_messages_as_the_rate_asks_and_a_dry_run_does_not(
    bench: Bench, environment: None, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def noted(delay_s: float, result: Any = None) -> Any:
        waits.append(delay_s)
        return await sleep(0 if delay_s == 1 / 7 else delay_s, result)

    monkeypatch.setattr(asyncio, "sleep", noted)
    for offset in range(3):
        source = Source(topic=bench.settings.topics.jobs, partition=0, offset=offset)
        await bury(bench, job_id=f"j{offset}", source=source, value=b"{}")
    await command(capsys, "replay", "--all", "--rate", "7", "--dry-run", "--json")
    assert waits.count(1 / 7) == 0
    await command(capsys, "replay", "--all", "--rate", "7", "--json")
    assert waits.count(1 / 7) == 3
