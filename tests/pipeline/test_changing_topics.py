"""Topics that are deleted, made anew or given partitions, and offsets that are deleted, while a worker runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.new_partitions import NewPartitions
from aiokafka.errors import ProducerFenced
from aiokafka.protocol.admin import DeleteGroupsRequest
from bench import Bench, GatedEngine, bench_on
from parts import KafkaNode, S3Part, create_topic, eventually

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.kafka.client import consumer_kwargs
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.pipeline.consuming import source
from nanovllm.pipeline.consuming.assignments import Assignments
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.pipeline.consuming.start_offset import GONE, StartOffsets
from nanovllm.pipeline.consuming.transactions import PartitionTransactions

pytestmark = pytest.mark.kafka

MODES = pytest.mark.parametrize("mode", ["at_least_once", "exactly_once"])
WITHIN_S = 45.0


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A node that makes no topic by itself."""
    node = KafkaNode(tmp_path_factory.mktemp("kafka"), settings={"auto.create.topics.enable": "false"})
    asyncio.run(node.start())
    yield node.bootstrap_servers
    node.stop()


@pytest.fixture
async def kafka(
    node: str, unique: Callable[[str], str], s3: S3Part, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    monkeypatch.setattr(source, "INTERVAL_S", 0.3)
    async with bench_on(node, unique, s3) as bench:
        yield bench


async def administer(bench: Bench, act: Callable[[AIOKafkaAdminClient], Awaitable[Any]]) -> Any:
    admin = AIOKafkaAdminClient(bootstrap_servers=bench.bootstrap_servers)
    await admin.start()
    try:
        return await act(admin)
    finally:
        await admin.close()


async def delete(bench: Bench, topic: str) -> None:
    await administer(bench, lambda admin: admin.delete_topics([topic]))


async def make_anew(bench: Bench, topic: str, partitions: int) -> None:
    """Create a topic whose deletion was asked for."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            try:
                return await create_topic(bench.bootstrap_servers, topic, partitions=partitions)
            except AssertionError:  # it is still being deleted
                await asyncio.sleep(0.05)


async def delete_group(bench: Bench) -> None:
    """Delete the group with its offsets, as soon as it has no members.

    Whoever works for it sends no heartbeats meanwhile. A member that joins again, because it committed or was slow
    after the coordinator had removed it, starts them again, so they are stopped before each attempt.
    """
    group = bench.settings.kafka.group_id

    async def is_deleted(admin: AIOKafkaAdminClient) -> None:
        coordinator = await admin.find_coordinator(group)
        for _ in range(300):
            if bench.source is not None:
                await bench.source._consumer._coordinator._stop_heartbeat_task()  # type: ignore[union-attr]
            answer = await admin._client.send(coordinator, DeleteGroupsRequest([group]))
            if answer.results[0][1] == 0:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"group {group} was never empty")

    await administer(bench, is_deleted)


def jobs(name: str, count: int) -> list[dict[str, str]]:
    return [{"job_id": f"{name}{number}", "prompt": "p"} for number in range(count)]


async def answered(bench: Bench, *ids: str) -> list[str]:
    """Return all answers so far, in order, as soon as ``ids`` are among them."""
    seen: list[str] = []
    async with AIOKafkaConsumer(
        bench.settings.topics.results,
        bootstrap_servers=bench.bootstrap_servers,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
    ) as consumer:
        async with asyncio.timeout(WITHIN_S):
            while not set(ids) <= set(seen):
                for records in (await consumer.getmany(timeout_ms=100)).values():
                    seen += [record.key.decode() for record in records]
    return seen


def overtaken(bench: Bench) -> float:
    samples = (sample for metric in bench.metrics.overtaken.collect() for sample in metric.samples)
    return sum(sample.value for sample in samples if sample.name.endswith("_total"))


@MODES
@pytest.mark.parametrize("partitions", [1, 2])
async def test_a_topic_that_is_made_anew_is_read_and_the_worker_is_unready_until_then(
    kafka: Bench, caplog: pytest.LogCaptureFixture, mode: str, partitions: int
) -> None:
    topic = kafka.settings.topics.jobs
    kafka.health.is_model_loaded = True
    async with kafka.working(EchoEngine(), delivery=mode) as (_, running):
        kafka.health.is_model_loaded = True
        await kafka.send(*jobs("old", 5))
        await kafka.send(*jobs("other", 3), partition=1)
        await answered(kafka, "old4", "other2")
        await eventually(lambda: not kafka.health.unready)
        await delete(kafka, topic)
        await eventually(lambda: any(topic in reason for reason in kafka.health.unready), within_s=WITHIN_S)
        assert f"topic {topic} is missing" in caplog.text
        await make_anew(kafka, topic, partitions)
        await kafka.send(*jobs("new", 3))
        await answered(kafka, "new0", "new1", "new2")
        await eventually(lambda: not kafka.health.unready)
        assert not running.done()
    assert f"topic {topic} is there again" in caplog.text
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) < 60


@MODES
async def test_records_of_the_new_topic_below_the_old_position_are_not_skipped(
    kafka: Bench, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    topic = kafka.settings.topics.jobs
    engine = GatedEngine()
    # The window is full: nothing is fetched, and no fetch tells that the topic has gone.
    narrow = kafka.settings.admission.model_copy(update={"max_jobs": 2})
    async with kafka.working(engine, delivery=mode, admission=narrow):
        await kafka.send(*jobs("old", 4))
        await engine.submitted("old0", "old1")
        await asyncio.sleep(1.5)  # the worker has looked at the topic, and knows how much waits
        await delete(kafka, topic)
        await make_anew(kafka, topic, 2)
        await kafka.send(*jobs("new", 12))
        engine.open(*(f"{name}{number}" for name in ("old", "new") for number in range(12)))
        await answered(kafka, *(f"new{number}" for number in range(12)))
    assert "was deleted and made anew" in caplog.text or "is missing" in caplog.text
    assert overtaken(kafka) > 0


@MODES
async def test_partitions_that_are_added_under_load_are_read(kafka: Bench, mode: str) -> None:
    topic = kafka.settings.topics.jobs
    async with kafka.working(EchoEngine(), delivery=mode):
        loading = asyncio.create_task(kafka.send(*jobs("load", 150)))
        await administer(kafka, lambda admin: admin.create_partitions({topic: NewPartitions(8)}))
        await loading
        await eventually(lambda: len(kafka.producer._metadata.partitions_for_topic(topic) or ()) in (2, 8))
        await kafka.producer.client.force_metadata_update()
        for partition in range(8):
            await kafka.send({"job_id": f"late{partition}", "prompt": "p"}, partition=partition)
        seen = await answered(kafka, *(f"load{number}" for number in range(150)), *(f"late{n}" for n in range(8)))
    if mode == "exactly_once":
        assert len(seen) == len(set(seen))


@MODES
async def test_a_group_whose_offsets_are_deleted_skips_nothing(kafka: Bench, mode: str) -> None:
    latest = {"auto_offset_reset": "latest", "session_timeout_ms": 1_000, "heartbeat_interval_ms": 200}
    settings = kafka.settings.kafka.model_copy(update=latest)

    async with kafka.working(EchoEngine(), delivery=mode, kafka=settings):
        assert kafka.source is not None
        await eventually(lambda: len(kafka.source.watermarks) == 2)
        await kafka.send(*jobs("before", 3))
        await answered(kafka, "before2")
        # The coordinator takes it for dead, and an operator deletes the group; while it has members that is refused.
        await delete_group(kafka)
        await kafka.send(*jobs("after", 3))
        await answered(kafka, "after0", "after1", "after2")
        await kafka.send(*jobs("later", 3), partition=1)
        await answered(kafka, "later2")


async def test_a_partition_whose_offset_is_gone_is_read_from_its_beginning_and_the_log_says_so(
    kafka: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    tp = TopicPartition(kafka.settings.topics.jobs, 0)
    consumer = AIOKafkaConsumer(**consumer_kwargs(kafka.settings.kafka))
    consumer.assign([tp])
    async with consumer:
        start_offsets = StartOffsets("latest", kafka.metrics)
        await start_offsets.look(consumer, [tp.topic])
        assert await start_offsets.committed(consumer, [tp]) == {tp: 0}
        await kafka.send(*jobs("job", 1))
        await delete_group(kafka)
        assert await start_offsets.committed(consumer, [tp]) == {}
    assert GONE in caplog.text


@MODES
@pytest.mark.parametrize("kind", ["results", "dead_letters"])
async def test_an_output_topic_that_is_made_anew_gets_what_waits_for_it(
    kafka: Bench, caplog: pytest.LogCaptureFixture, mode: str, kind: str
) -> None:
    topic = getattr(kafka.settings.topics, kind)
    async with kafka.working(EchoEngine(), delivery=mode) as (_, running):
        kafka.health.is_model_loaded = True
        await kafka.send(*jobs("old", 2), b"{")
        await kafka.read(topic, 1)
        await eventually(lambda: not kafka.health.unready)
        await asyncio.sleep(1.5)  # the worker has seen the topic
        await delete(kafka, topic)
        await kafka.send(*jobs("new", 2), b"{")
        await eventually(lambda: any(topic in reason for reason in kafka.health.unready), within_s=WITHIN_S)
        await make_anew(kafka, topic, 2)
        await kafka.read(topic, 2 if kind == "results" else 1)
        await eventually(lambda: not kafka.health.unready)
        assert not running.done()
    assert f"topic {topic} is there again" in caplog.text
    assert len([record for record in caplog.records if "not found" in record.message]) < 100  # it was 700 a second


async def test_a_partition_that_is_assigned_anew_while_it_is_taken_in_is_taken_in_again(
    kafka: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tp = TopicPartition(kafka.settings.topics.jobs, 0)
    lost: list[PartitionLedger] = []
    start_offsets = StartOffsets("earliest", kafka.metrics)
    assignments = Assignments(
        kafka.settings.kafka, start_offsets, max_out_of_order=10, lost=lost.append, exactly_once=False, crash_guard=None
    )
    near = start_offsets.near

    async def rebalance_meanwhile(*wanted: Any) -> int:
        monkeypatch.setattr(start_offsets, "near", near)
        assignments.revoke([tp])
        assignments.assign([tp])
        return await near(*wanted)

    monkeypatch.setattr(start_offsets, "near", rebalance_meanwhile)
    consumer = AIOKafkaConsumer(**consumer_kwargs(kafka.settings.kafka))
    consumer.assign([tp])
    async with consumer:
        assignments.assign([tp])
        await assignments.take_in(consumer, takes_work=True)
        assert not assignments.active
        assert len(lost) == 1
        await assignments.take_in(consumer, takes_work=True)
        assert assignments.active.keys() == {tp}


async def test_a_producer_that_is_renewed_after_its_end_fences_nobody(kafka: Bench) -> None:
    tp = TopicPartition(kafka.settings.topics.jobs, 0)

    async def committed(_: TopicPartition) -> int | None:
        return None

    before, after = (PartitionTransactions(tp, kafka.settings.kafka, committed) for _ in range(2))
    await before.open()
    await before.close()
    await after.open()
    with pytest.raises(ProducerFenced):
        await before.open()
    after.follow(ledger := PartitionLedger(0, max_out_of_order=10))
    ledger.deliver(0)
    await after.release({0: [OutgoingRecord(kafka.settings.topics.results, b"k", b"v")]})
    assert len(await kafka.read(kafka.settings.topics.results, 1)) == 1
    await after.close()
