"""The record of jobs at work in its topic: what the next owner of a partition finds there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from parts import create_topic

from nanovllm.errors import CrashedWorker, EngineDead
from nanovllm.kafka.client import producer_kwargs
from nanovllm.kafka.recovering_producer import RecoveringProducer
from nanovllm.pipeline.consuming.crash_guard import CrashGuard
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.settings.kafka import KafkaSettings

pytestmark = pytest.mark.kafka

JOBS = [TopicPartition("jobs", number) for number in range(2)]


class Owner:
    """One worker's side of the topic, with an open job at offset 0 and 1 of each partition."""

    def __init__(self, crash_guard: CrashGuard) -> None:
        self.crash_guard = crash_guard
        self.ledgers = [PartitionLedger(0, max_out_of_order=10) for _ in JOBS]

    async def take_in(self) -> Owner:
        for tp, ledger in zip(JOBS, self.ledgers, strict=True):
            await self.crash_guard.take_in(tp, ledger)
        return self

    def delivery(self, partition: int, offset: int) -> ConsumedRecord:
        return ConsumedRecord("jobs", partition, offset, None, None, b"", ledger=self.ledgers[partition])

    async def die_with(self, *places: tuple[int, int]) -> None:
        """The engine dies while these are in it."""
        if not places:
            raise EngineDead("killed")
        delivery = self.delivery(*places[0])
        async with self.crash_guard.enter(delivery):
            await self.crash_guard.recorded(delivery)
            await self.die_with(*places[1:])

    async def run(self, partition: int, offset: int) -> None:
        delivery = self.delivery(partition, offset)
        async with self.crash_guard.enter(delivery):
            await self.crash_guard.recorded(delivery)


@pytest.fixture
async def owner(kafka_broker: str, unique: Callable[[str], str]) -> AsyncIterator[Callable[[], Owner]]:
    topic = unique("in-flight")
    await create_topic(kafka_broker, topic, partitions=1, settings={"cleanup.policy": "compact"})
    kafka = KafkaSettings(bootstrap_servers=kafka_broker, group_id=unique("group"))
    producer = RecoveringProducer(lambda: AIOKafkaProducer(**producer_kwargs(kafka)))
    await producer.start()
    yield lambda: Owner(CrashGuard(topic, kafka, producer, limit=2))
    await producer.stop()


async def test_only_who_was_alone_is_charged_and_the_limit_buries_it(owner: Callable[[], Owner]) -> None:
    with pytest.raises(EngineDead):
        await (await owner().take_in()).die_with((0, 0), (1, 0))
    for _ in range(2):
        survivor = await owner().take_in()
        # The innocent runs alone first and comes out; the next death is not its own, though it is not committed yet.
        await survivor.run(1, 0)
        with pytest.raises(EngineDead):
            await survivor.die_with((0, 0))
    last = await owner().take_in()
    await last.run(1, 0)
    with pytest.raises(CrashedWorker, match="2 workers died"):
        await last.run(0, 0)


async def test_a_worker_that_lives_leaves_no_suspects_and_finds_its_jobs_again(owner: Callable[[], Owner]) -> None:
    first = await owner().take_in()
    delivery = first.delivery(0, 0)
    async with first.crash_guard.enter(delivery):
        await first.crash_guard.recorded(delivery)
        await first.crash_guard.part(first.ledgers)
        between = await owner().take_in()
        async with between.crash_guard.enter(between.delivery(0, 1)), between.crash_guard.enter(between.delivery(0, 0)):
            pass  # alone, each would wait for the other
        # The partition comes straight back: what is at work is on record again.
        await first.take_in()
    with pytest.raises(EngineDead):
        await first.die_with((0, 0))
    heir = await owner().take_in()
    await heir.run(0, 0)


async def test_the_record_is_found_behind_those_of_other_partitions(owner: Callable[[], Owner]) -> None:
    first = await owner().take_in()

    async def die_after_much_other_work() -> None:
        async with first.crash_guard.enter(first.delivery(0, 0)):
            await first.crash_guard.recorded(first.delivery(0, 0))
            for _ in range(150):
                await first.run(1, 0)
            raise EngineDead("killed")

    with pytest.raises(EngineDead):
        await die_after_much_other_work()
    for _ in range(2):
        with pytest.raises(EngineDead):
            await (await owner().take_in()).die_with((0, 0))
    with pytest.raises(CrashedWorker):
        await (await owner().take_in()).run(0, 0)
