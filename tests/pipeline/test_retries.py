"""Delayed retries through real topics, and the circuit that opens when nothing can be read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiokafka import ConsumerRecord, TopicPartition
from bench import Bench, FaultyFetcher, eventually, png, reached
from parts import create_topic

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import (
    BrokersUnavailable,
    FetchFailed,
    NanoVLLMError,
    ObjectNotFound,
    ObjectUnavailable,
    TransientError,
)
from nanovllm.kafka.client import producer_kwargs
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.pipeline.consuming.delayed_partitions import DelayedPartitions
from nanovllm.pipeline.consuming.retry_topics import Origin, RetryTopics
from nanovllm.pipeline.failure.backoff import Backoff
from nanovllm.pipeline.failure.circuit_breaker import CircuitBreaker
from nanovllm.settings.failures import RetrySettings
from nanovllm.settings.worker import Settings
from nanovllm.sinks.kafka import KafkaSink

TIERS = (1, 2)


@pytest.fixture
async def tiered(bench: Bench) -> Bench:
    """A bench whose jobs wait one second, then two, before they are given up."""
    retries = RetrySettings(delays_s=TIERS)
    bench.settings = bench.settings.model_copy(update={"retries": retries})
    await create_topic(bench.bootstrap_servers, *RetryTopics.of(bench.settings).delays_s, partitions=1)
    return bench


def image_job(job_id: str | None, uri: str, **more: Any) -> bytes:
    named = {"job_id": job_id} if job_id else {}
    return json.dumps({**named, "prompt": "<|image|>", "images": [uri], **more}).encode()


class SpoiltObject(FaultyFetcher):
    """One object cannot be read the first ``failures`` times, or ever; the others can."""

    def __init__(self, settings: Any, uri: str, *, failures: int | None = None) -> None:
        super().__init__(settings, FetchFailed("the object store answered 503 SlowDown"), failures=failures)
        self.uri = uri

    async def fetch(self, ref: Any, **held: Any) -> Any:
        return await (super().fetch(ref) if ref.uri == self.uri else ObjectFetcher.fetch(self, ref, **held))


async def test_a_job_that_fails_for_long_waits_aside_and_holds_up_nobody(
    tiered: Bench, images: Callable[[str, bytes], str]
) -> None:
    bad, good = images("bad.png", png()), images("good.png", png("blue"))
    # By number, not by time: on a busy machine the job would be given up before anything could be healed.
    fetcher = SpoiltObject(tiered.settings, bad, failures=tiered.settings.s3.max_attempts)
    headers = [("tenant", b"acme"), ("nanovllm_attempts", b"forged")]
    await tiered.send(image_job(None, bad), key=b"k", headers=headers)
    await tiered.send(image_job("good", good))
    async with tiered.working(EchoEngine(), fetcher):
        await eventually(lambda: reached(tiered, 2))
        (waiting,) = await tiered.read(next(iter(RetryTopics.of(tiered.settings).delays_s)), 1)
        assert (waiting.key, waiting.value) == (b"k", image_job(None, bad))
        results = await tiered.results(2)
    derived = f"{tiered.settings.topics.jobs}:0:0"
    assert set(results) == {derived, "good"}
    assert results[derived]["source"]["topic"] == tiered.settings.topics.jobs
    carried = dict(waiting.headers)
    assert carried["tenant"] == b"acme"
    assert carried["nanovllm_attempts"] == b"4"
    assert datetime.fromisoformat(carried["nanovllm_first_failed_at"].decode()) <= datetime.now(UTC)
    assert 'nanovllm_jobs_total{outcome="retry"} 1.0' in tiered.metrics.exposition().decode()


async def test_a_delayed_retry_that_cannot_be_built_is_a_dead_letter(
    tiered: Bench, images: Callable[[str, bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> object:
        raise RuntimeError

    monkeypatch.setattr(Origin, "retry_headers", fails)
    bad = images("bad.png", png())
    await tiered.send(image_job("bad", bad), image_job("good", images("good.png", png("blue"))))
    async with tiered.working(EchoEngine(), SpoiltObject(tiered.settings, bad)):
        ((headers, value),) = await tiered.dead_letters(1)
        assert set(await tiered.results(1)) == {"good"}
        await eventually(lambda: reached(tiered, 2))
    assert (headers["nanovllm_code"], headers["nanovllm_stage"]) == ("internal", "fetch")
    assert value == image_job("bad", bad)


async def test_after_the_last_tier_it_is_a_dead_letter_that_counts_all_attempts(
    tiered: Bench, images: Callable[[str, bytes], str]
) -> None:
    bad = images("bad.png", png())
    fetcher = SpoiltObject(tiered.settings, bad)
    await tiered.send(image_job("j", bad), key=b"k", headers=[("traceparent", b"00-ab"), ("nanovllm_replays", b"2")])
    async with tiered.working(EchoEngine(), fetcher):
        ((headers, value),) = await tiered.dead_letters(1)
        await eventually(lambda: reached(tiered, 1))
    assert value == image_job("j", bad)
    assert (headers["traceparent"], headers["nanovllm_replays"]) == ("00-ab", "2")
    assert (headers["nanovllm_class"], headers["nanovllm_attempts"]) == ("retries_exhausted", "12")
    assert (headers["nanovllm_source_topic"], headers["nanovllm_source_offset"]) == (tiered.settings.topics.jobs, "0")
    waited = datetime.fromisoformat(headers["nanovllm_failed_at"]) - datetime.fromisoformat(
        headers["nanovllm_first_failed_at"]
    )
    assert waited >= timedelta(seconds=sum(TIERS))


async def test_a_job_that_would_be_due_after_its_deadline_does_not_wait(
    tiered: Bench, images: Callable[[str, bytes], str]
) -> None:
    bad = images("bad.png", png())
    tiered.settings = tiered.settings.model_copy(update={"retries": RetrySettings(delays_s=(3_600,))})
    await create_topic(tiered.bootstrap_servers, *RetryTopics.of(tiered.settings).delays_s, partitions=1)
    deadline = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
    await tiered.send(image_job("j", bad, deadline=deadline))
    async with tiered.working(EchoEngine(), SpoiltObject(tiered.settings, bad)):
        ((headers, _),) = await tiered.dead_letters(1)
    assert (headers["nanovllm_class"], headers["nanovllm_attempts"]) == ("retries_exhausted", "4")


@pytest.mark.kafka
async def test_a_kill_between_retries_loses_nothing_on_apache_kafka(
    kafka_broker: str, tiered: Bench, images: Callable[[str, bytes], str]
) -> None:
    from aiokafka import AIOKafkaProducer

    names = tiered.settings.topics
    topics = [names.jobs, names.results, names.metrics, names.dead_letters, *RetryTopics.of(tiered.settings).delays_s]
    await create_topic(kafka_broker, *topics, partitions=1)
    kafka = tiered.settings.kafka.model_copy(update={"bootstrap_servers": kafka_broker})
    settings = tiered.settings.model_copy(update={"kafka": kafka})
    producer = AIOKafkaProducer(**producer_kwargs(kafka))
    await producer.start()
    try:
        there = Bench(kafka_broker, settings, producer, tiered.decoders)
        bad = images("bad.png", png())
        fetcher = SpoiltObject(settings, bad, failures=settings.s3.max_attempts)
        await there.send(image_job("j", bad))
        async with there.working(EchoEngine(), fetcher) as (_, running):
            await there.read(next(iter(RetryTopics.of(settings).delays_s)), 1)
            running.cancel()
            await asyncio.wait([running])
        async with there.working(EchoEngine(), fetcher):
            assert set(await there.results(1)) == {"j"}
    finally:
        await producer.stop()


async def test_when_nothing_can_be_read_the_intake_stops_and_comes_back_by_itself(
    bench: Bench, images: Callable[[str, bytes], str]
) -> None:
    uris = [images(f"{number}.png", png()) for number in range(12)]
    fetcher = FaultyFetcher(bench.settings, FetchFailed("the object store answered 503 SlowDown"))
    retries = RetrySettings(breaker_objects=4, breaker_wait_s=0.3, breaker_max_wait_s=0.6)
    for uri in uris:
        await bench.send(image_job(uri, uri))
    async with bench.working(EchoEngine(), fetcher, retries=retries):
        await eventually(lambda: bench.health.systemic is not None)
        await bench.send({"job_id": "text", "prompt": "p"})
        attempts = fetcher.attempts
        await asyncio.sleep(2)
        # Twelve jobs with a backoff of 50 ms at most would have asked hundreds of times.
        assert fetcher.attempts - attempts <= 12
        fetcher.heal()
        assert set(await bench.results(13)) == {*uris, "text"}
        assert bench.health.systemic is None


def breaker(threshold: int = 3) -> tuple[CircuitBreaker, list[float]]:
    openings: list[float] = []
    waits = Backoff(base_s=0.01, cap_s=0.04)
    return CircuitBreaker(threshold=threshold, waits=waits, opened=lambda _, wait: openings.append(wait)), openings


async def failing() -> None:
    raise FetchFailed("503")


async def working() -> str:
    return "read"


async def test_one_object_that_fails_over_and_over_opens_nothing() -> None:
    circuit, openings = breaker()
    for _ in range(10):
        with pytest.raises(TransientError):
            await circuit.call("same", failing)
    assert circuit.is_closed
    assert not openings


async def test_a_success_or_a_clear_answer_between_starts_the_count_again() -> None:
    async def missing() -> None:
        raise ObjectNotFound("404")

    async def unavailable() -> None:
        raise ObjectUnavailable("400 KMS.DisabledException")

    circuit, openings = breaker()
    for between in (working, missing, unavailable):
        for name in ("a", "b"):
            with pytest.raises(TransientError):
                await circuit.call(name, failing)
        with suppress(ObjectNotFound, ObjectUnavailable):
            await circuit.call("c", between)
    assert not openings


async def test_objects_that_the_store_keeps_back_open_nothing() -> None:
    async def unavailable() -> None:
        raise ObjectUnavailable("400 KMS.DisabledException")

    circuit, openings = breaker()
    for name in "abcdef":
        with pytest.raises(TransientError):
            await circuit.call(name, unavailable)
    assert circuit.is_closed
    assert not openings


async def test_open_it_lets_one_ask_at_a_time_and_waits_longer_each_time() -> None:
    circuit, openings = breaker()
    for name in "abc":
        with pytest.raises(TransientError):
            await circuit.call(name, failing)
    asking = 0
    most = 0

    async def ask() -> str:
        nonlocal asking, most
        asking += 1
        most = max(most, asking)
        await asyncio.sleep(0.005)
        asking -= 1
        if len(openings) < 4:
            raise FetchFailed("503")
        return "read"

    outcomes = await asyncio.gather(*(circuit.call(str(n), ask) for n in range(8)), return_exceptions=True)
    assert openings == [0.01, 0.02, 0.04, 0.04]
    assert outcomes.count("read") == 5
    assert circuit.is_closed


async def test_a_probe_that_is_cancelled_leaves_its_turn_to_another() -> None:
    circuit, _ = breaker(threshold=1)
    with pytest.raises(TransientError):
        await circuit.call("a", failing)
    probe = asyncio.create_task(circuit.call("b", lambda: asyncio.sleep(60)))
    await asyncio.sleep(0.05)
    probe.cancel()
    assert await circuit.call("c", working) == "read"


def record(offset: int, timestamp_ms: float) -> ConsumerRecord:
    return ConsumerRecord("t", 0, offset, int(timestamp_ms), 0, None, b"", None, 0, 0, ())


def test_a_delayed_head_holds_its_partition_until_it_is_due_and_never_for_ever() -> None:
    now = 1_000.0
    heads = DelayedPartitions({"t": 60}, clock=lambda: now)
    tp = TopicPartition("t", 0)
    due, fresh, future = record(3, 900_000), record(7, 990_000), record(9, 9_000_000_000)
    assert heads.split(tp, [due, fresh, future]) == ([due], 7)
    assert not heads.is_over(tp)
    now = 1_050.0
    assert heads.is_over(tp)
    assert heads.split(tp, [fresh, future]) == ([fresh], 9)
    now = 1_109.9
    assert not heads.is_over(tp)
    now = 1_110.0
    assert heads.split(tp, [future]) == ([future], None)
    assert heads.split(TopicPartition("jobs", 0), [fresh]) == ([fresh], None)


def test_tiers_are_gone_through_in_their_order_and_delays_must_grow() -> None:
    tiers = RetryTopics({"jobs": 0}, (60, 600))
    assert tuple(tiers.delays_s) == ("jobs.retry-60s", "jobs.retry-600s")
    assert tiers.topic_after("jobs", before=None) == "jobs.retry-60s"
    assert tiers.topic_after("jobs.retry-60s", before=None) == "jobs.retry-600s"
    assert tiers.topic_after("jobs.retry-600s", before=None) is None
    assert RetryTopics({"jobs": 0}, ()).topic_after("jobs", before=None) is None
    for wrong in ((0,), (60, 60), (600, 60)):
        with pytest.raises(ValueError, match="longer than the one before"):
            RetrySettings(delays_s=wrong)


def test_retry_topics_and_order_by_key_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        Settings.model_validate({"retries": {"delays_s": [60]}, "admission": {"per_key_order": True}})


@pytest.mark.parametrize(
    "forged",
    [
        {"first_failed_at": "0001-01-01T00:00:00+14:00"},
        {"first_failed_at": "9999-12-31T23:59:59-14:00"},
        {"first_failed_at": "yesterday"},
        {"source_topic": "t" * 100_000},
        {"source_offset": "9" * 5_000},
        {"attempts": "many"},
        {"attempts": "-5"},
        {"attempts": "9" * 200},
    ],
)
async def test_forged_headers_in_a_retry_topic_make_a_job_like_any_other(tiered: Bench, forged: dict[str, str]) -> None:
    headers = {
        "source_topic": "jobs",
        "source_partition": "0",
        "source_offset": "1",
        "attempts": "2",
        "first_failed_at": "2026-01-01T00:00:00+00:00",
        **forged,
    }
    (first, *_) = RetryTopics.of(tiered.settings).delays_s
    own = [(f"nanovllm_{name}", value.encode()) for name, value in headers.items()]
    await tiered.producer.send_and_wait(first, b"{not json", partition=0, headers=own)
    async with tiered.working(EchoEngine()):
        ((envelope, value),) = await tiered.dead_letters(1)
    assert value == b"{not json"
    assert (envelope["nanovllm_source_topic"], envelope["nanovllm_source_offset"]) == (first, "0")


async def test_what_one_topic_has_acknowledged_is_not_sent_again_because_another_one_refuses(bench: Bench) -> None:
    refusals = 0

    class NoMetrics(KafkaSink):
        """No right to write to the metrics topic, for a while."""

        async def publish_each(self, records: Sequence[OutgoingRecord]) -> list[NanoVLLMError | None]:
            nonlocal refusals
            metrics = [one for one in records if one.topic == bench.settings.topics.metrics] if refusals < 12 else []
            refusals += len(metrics)
            errors = iter(await super().publish_each([one for one in records if one not in metrics]))
            refusal = BrokersUnavailable("the brokers refuse what is sent to topic metrics")
            return [refusal if one in metrics else next(errors) for one in records]

    async with bench.working(EchoEngine(), sink=NoMetrics(bench.producer)):
        for number in range(5):
            await bench.send({"job_id": f"j{number}", "prompt": "p"})
        await eventually(lambda: refusals >= 12)
        await bench.read(bench.settings.topics.metrics, 5)
        await eventually(lambda: reached(bench, 5))
        assert len(await bench.read(bench.settings.topics.results, 5)) == 5
        with pytest.raises(TimeoutError):
            await bench.read(bench.settings.topics.results, 6, timeout_s=2)
