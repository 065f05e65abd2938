"""``delivery: exactly_once`` on Apache Kafka: one owner, one visible output a job, in the order of the offsets."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from bench import Bench, GatedEngine, source_of
from parts import create_topic, eventually

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import MessageTooLarge
from nanovllm.kafka.client import producer_kwargs, transactional_kwargs
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.consuming.source import JobSource
from nanovllm.settings.kafka import KafkaSettings

pytestmark = pytest.mark.kafka

JOBS = 200
# The shortest that the node of the tests allows.
SETTINGS = {"session_timeout_ms": 1_000, "heartbeat_interval_ms": 200}


@dataclass
class Owner:
    """A source whose jobs end when the test says so."""

    source: JobSource
    output: str
    taken: dict[tuple[int, int], ConsumedRecord] = field(default_factory=dict)
    lost: list[PartitionLedger] = field(default_factory=list)

    async def poll(self) -> None:
        while True:
            for delivery in await self.source.poll(100, 50):
                self.taken[delivery.partition, delivery.offset] = delivery

    async def end(self, delivery: ConsumedRecord, value: bytes | None = None) -> None:
        assert delivery.transactions is not None
        record = OutgoingRecord(self.output, b"k", value or delivery.value)
        await delivery.transactions.release({delivery.offset: [record]})


@dataclass
class Topics:
    bootstrap_servers: str
    jobs: str
    output: str
    kafka: KafkaSettings
    producer: AIOKafkaProducer

    @asynccontextmanager
    async def owner(self) -> AsyncIterator[Owner]:
        async def drain() -> None:
            return None

        lost: list[PartitionLedger] = []
        source = source_of(self.kafka, self.jobs, drain=drain, lost=lost.append, exactly_once=True)
        await source.start()
        owner = Owner(source, self.output, lost=lost)
        polling = asyncio.create_task(owner.poll())
        try:
            yield owner
        finally:
            await source.stop()
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)

    async def send(self, count: int, partition: int = 0) -> None:
        for number in range(count):
            await self.producer.send_and_wait(self.jobs, b"%d" % number, partition=partition)

    async def visible(self, isolation_level: str = "read_committed") -> list[bytes]:
        """What a reader from the beginning sees now."""
        async with AIOKafkaConsumer(
            self.output,
            bootstrap_servers=self.bootstrap_servers,
            auto_offset_reset="earliest",
            isolation_level=isolation_level,
        ) as consumer:
            seen: list[bytes] = []
            for _ in range(3):
                for records in (await consumer.getmany(timeout_ms=300)).values():
                    seen += [record.value for record in records]
            return seen

    async def reaches(self, offset: int) -> None:
        """Return when the group has committed ``offset``: a transaction ends a moment after its producer is told."""
        for _ in range(3_000):
            if await self.committed() == offset:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"offset {offset} was never committed")

    async def committed(self, partition: int = 0) -> int | None:
        async with AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap_servers, group_id=self.kafka.group_id, enable_auto_commit=False
        ) as consumer:
            return await consumer.committed(TopicPartition(self.jobs, partition))


@pytest.fixture
async def topics(kafka_broker: str, unique: Callable[[str], str]) -> AsyncIterator[Topics]:
    jobs, output = unique("jobs"), unique("output")
    await create_topic(kafka_broker, jobs, output, partitions=1)
    kafka = KafkaSettings(bootstrap_servers=kafka_broker, group_id=unique("group"), **SETTINGS)
    async with AIOKafkaProducer(bootstrap_servers=kafka_broker) as producer:
        yield Topics(kafka_broker, jobs, output, kafka, producer)


async def test_outputs_are_visible_in_the_order_of_the_offsets_and_with_them(topics: Topics) -> None:
    await topics.send(4)
    async with topics.owner() as owner:
        await eventually(lambda: len(owner.taken) == 4)
        later = [asyncio.create_task(owner.end(owner.taken[0, offset])) for offset in (3, 1, 2)]
        await asyncio.sleep(0.5)
        assert not any(task.done() for task in later)
        assert await topics.visible() == []
        await owner.end(owner.taken[0, 0])
        await asyncio.gather(*later)
        await topics.reaches(4)
        assert await topics.visible() == [b"0", b"1", b"2", b"3"]


async def test_an_owner_that_does_not_know_it_was_replaced_can_show_and_commit_nothing(topics: Topics) -> None:
    await topics.send(3)
    async with topics.owner() as zombie:
        await eventually(lambda: len(zombie.taken) == 3)
        # A zombie's heart stands still for its group, and its work goes on.
        await zombie.source._consumer._coordinator._stop_heartbeat_task()  # type: ignore[union-attr]
        async with topics.owner() as owner:
            await eventually(lambda: len(owner.taken) == 3)
            late = asyncio.create_task(zombie.end(zombie.taken[0, 0], b"from the zombie"))
            for offset in range(3):
                await owner.end(owner.taken[0, offset])
            await eventually(lambda: len(zombie.lost) == 1)
            late.cancel()
            await asyncio.gather(late, return_exceptions=True)
            await topics.reaches(3)
    assert await topics.visible() == [b"0", b"1", b"2"]


async def test_an_owner_that_is_fenced_by_a_latecomer_takes_its_partition_again(topics: Topics) -> None:
    await topics.send(2)
    async with topics.owner() as owner:
        await eventually(lambda: len(owner.taken) == 2)
        first = owner.taken[0, 0]
        kwargs = transactional_kwargs(topics.kafka, topics.jobs, 0)
        async with AIOKafkaProducer(**kwargs):
            late = asyncio.create_task(owner.end(first))
            await eventually(lambda: owner.taken[0, 0] is not first)
            late.cancel()
            assert not first.is_current
        for offset in range(2):
            await owner.end(owner.taken[0, offset])
    assert await topics.visible() == [b"0", b"1"]


async def test_a_job_whose_record_is_refused_does_not_take_the_others_with_it(topics: Topics) -> None:
    await topics.send(3)
    async with topics.owner() as owner:
        await eventually(lambda: len(owner.taken) == 3)

        async def end(offset: int, value: bytes | None = None) -> str:
            for _ in range(3_000):
                try:
                    await owner.end(owner.taken[0, offset], value)
                except MessageTooLarge:
                    value = b"buried"
                except Exception:
                    await asyncio.sleep(0.01)
                else:
                    return "ended"
            return "never"

        outcomes = await asyncio.gather(end(0), end(1, b"x" * 2_000_000), end(2))
        assert outcomes == ["ended"] * 3
        await topics.reaches(3)
    assert await topics.visible() == [b"0", b"buried", b"2"]


async def test_a_partition_that_comes_straight_back_keeps_its_jobs(topics: Topics) -> None:
    await topics.send(3)
    async with topics.owner() as owner:
        await eventually(lambda: len(owner.taken) == 3)
        waiting = asyncio.create_task(owner.end(owner.taken[0, 1]))
        async with topics.owner() as other:
            await eventually(lambda: other.source.has_joined)
            await eventually(lambda: bool(owner.source.watermarks or other.source.watermarks))
            if owner.source.watermarks:
                assert owner.lost == []
                await owner.end(owner.taken[0, 0])
                await waiting
                await owner.end(owner.taken[0, 2])
            else:
                await eventually(lambda: len(other.taken) == 3)
                for offset in range(3):
                    await other.end(other.taken[0, offset])
        waiting.cancel()
    assert await topics.visible() == [b"0", b"1", b"2"]


async def test_the_lag_of_an_idle_partition_behind_transaction_markers_reaches_zero(topics: Topics) -> None:
    kwargs = transactional_kwargs(topics.kafka, "elsewhere", 0)
    async with AIOKafkaProducer(**kwargs) as producer, topics.owner() as owner:
        async with producer.transaction():
            await producer.send(topics.jobs, b"0", partition=0)
        await eventually(lambda: len(owner.taken) == 1)
        await owner.end(owner.taken[0, 0])
        await eventually(lambda: owner.source.watermarks == {(topics.jobs, 0): 2})
        await owner.source.commit()
        await topics.reaches(2)
        assert await owner.source.is_drained()


@pytest.fixture
async def kafka_bench(kafka_broker: str, bench: Bench, unique: Callable[[str], str]) -> AsyncIterator[Bench]:
    """``bench`` moved to Apache Kafka, exactly once."""
    topics = bench.settings.topics
    await create_topic(kafka_broker, topics.jobs, topics.results, topics.metrics, topics.dead_letters, partitions=2)
    kafka = KafkaSettings(bootstrap_servers=kafka_broker, group_id=unique("group"), **SETTINGS)
    settings = bench.settings.model_copy(update={"kafka": kafka, "delivery": "exactly_once"})
    async with AIOKafkaProducer(**producer_kwargs(kafka)) as producer:
        yield Bench(kafka_broker, settings, producer, bench.decoders)


async def test_the_worker_answers_and_buries_each_job_once(kafka_bench: Bench) -> None:
    bench = kafka_bench
    jobs = [{"job_id": f"j{n}", "prompt": "p"} for n in range(JOBS)]
    await asyncio.gather(*(bench.send(job, partition=n % 2) for n, job in enumerate(jobs)), bench.send(b"{bad"))
    async with bench.working(EchoEngine()):
        records = await bench.read(bench.settings.topics.results, JOBS)
        letters = await bench.dead_letters(1)
    assert Counter(json.loads(record.value)["job_id"] for record in records) == {f"j{n}": 1 for n in range(JOBS)}
    assert len(letters) == 1
    by_offset = [(s["partition"], s["offset"]) for s in (json.loads(record.value)["source"] for record in records)]
    for partition in range(2):
        offsets = [offset for where, offset in by_offset if where == partition]
        assert len(offsets) == len(set(offsets))
    for _ in range(3_000):
        ended = [await bench.committed(partition) or 0 for partition in range(2)]
        if sum(ended) == JOBS + 1:
            break
        await asyncio.sleep(0.02)
    assert sum(ended) == JOBS + 1


async def test_outputs_that_wait_for_a_slow_job_leave_their_places_to_others(kafka_bench: Bench) -> None:
    bench = kafka_bench
    engine = GatedEngine()
    engine.open(*(f"j{n}" for n in range(1, 60)))
    await bench.send(*({"job_id": f"j{n}", "prompt": "p"} for n in range(60)))
    async with bench.working(engine):
        # Only 16 are admitted at once; one that waits for its release is no longer one of them.
        await eventually(lambda: len(engine.requests) == 60)
        assert await bench.committed() in (None, 0)
        engine.open("j0")
        assert len(await bench.results(60)) == 60
