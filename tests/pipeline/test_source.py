"""The consumer group's side of the worker, on the embedded broker: taking, settling, rebalancing."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, OffsetAndMetadata
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, RecordsToDelete
from aiokafka.errors import KafkaConnectionError, KafkaError
from aiokafka.structs import TopicPartition
from bench import source_of
from parts import create_topic

from nanovllm.errors import BrokersUnavailable
from nanovllm.kafka.admin import create_topics
from nanovllm.metrics import Metrics
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.consuming.source import JobSource
from nanovllm.pipeline.consuming.start_offset import StartOffsets
from nanovllm.settings.kafka import KafkaSettings


@dataclass
class Member:
    """One source that is polled all the time; what it is given stays open until the test completes it."""

    source: JobSource
    metrics: Metrics
    taken: dict[tuple[int, int], ConsumedRecord] = field(default_factory=dict)
    lost: list[PartitionLedger] = field(default_factory=list)
    repeated: int = 0
    room: int = 100
    polls: int = 0

    async def poll(self) -> None:
        while True:
            for record in await self.source.poll(self.room, 50):
                position = (record.partition, record.offset)
                self.repeated += position in self.taken
                self.taken[position] = record
            self.polls += 1

    async def polled(self, times: int = 5) -> None:
        """Return when the source was polled so often again: what it was to give until then, it has given."""
        begun = self.polls
        await eventually(lambda: self.polls >= begun + times)

    @property
    def overtaken(self) -> int:
        samples = (sample for metric in self.metrics.overtaken.collect() for sample in metric.samples)
        return int(sum(sample.value for sample in samples if sample.name.endswith("_total")))

    @property
    def partitions(self) -> set[int]:
        return {partition for _, partition in self.source.watermarks}


@dataclass
class Group:
    bootstrap_servers: str
    topic: str
    settings: KafkaSettings
    producer: AIOKafkaProducer

    @asynccontextmanager
    async def member(
        self,
        *,
        max_out_of_order: int = 1_000,
        room: int = 100,
        settings: KafkaSettings | None = None,
        delays_s: dict[str, int] | None = None,
        exactly_once: bool = False,
    ) -> AsyncIterator[Member]:
        async def drain() -> None:
            return None

        lost: list[PartitionLedger] = []
        metrics = Metrics()
        source = source_of(
            settings or self.settings,
            self.topic,
            max_out_of_order=max_out_of_order,
            drain=drain,
            lost=lost.append,
            metrics=metrics,
            delays_s=delays_s,
            exactly_once=exactly_once,
        )
        await source.start()
        member = Member(source, metrics, lost=lost, room=room)
        polling = asyncio.create_task(member.poll())
        try:
            yield member
        finally:
            await source.stop()
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)

    async def send(self, partition: int, count: int) -> None:
        for number in range(count):
            await self.producer.send_and_wait(self.topic, b"%d" % number, partition=partition)

    async def delete_before(self, partition: int, offset: int) -> None:
        """What retention does, at once."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap_servers)
        await admin.start()
        try:
            await admin.delete_records({TopicPartition(self.topic, partition): RecordsToDelete(before_offset=offset)})
        finally:
            await admin.close()

    async def add_partitions(self, total: int) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap_servers)
        await admin.start()
        try:
            await admin.create_partitions({self.topic: NewPartitions(total_count=total)})
            await eventually(lambda: self._has_partitions(admin, total))
        finally:
            await admin.close()
        # The producer's own metadata would be as old as a client's may be.
        await self.producer.client.force_metadata_update()

    async def _has_partitions(self, admin: AIOKafkaAdminClient, total: int) -> bool:
        (described,) = await admin.describe_topics([self.topic])
        return len(described["partitions"]) == total

    async def make_anew(self) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap_servers)
        await admin.start()
        try:
            await admin.delete_topics([self.topic])
        finally:
            await admin.close()
        # The broker deletes a while after its answer: what is sent until then goes to the old log. And it may have made
        # the topic by itself already, when a client asked for it.
        async with asyncio.timeout(60):
            while not await self._is_empty():
                await create_topics(self.settings, [self.topic])
                await asyncio.sleep(0.2)
        await self.producer.client.force_metadata_update()

    async def _is_empty(self) -> bool:
        consumer = AIOKafkaConsumer(bootstrap_servers=self.bootstrap_servers, request_timeout_ms=2_000)
        await consumer.start()
        try:
            tp = TopicPartition(self.topic, 0)
            return (await consumer.end_offsets([tp]))[tp] == 0
        except KafkaError:
            return False
        finally:
            await consumer.stop()

    async def committed(self, partition: int) -> int | None:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap_servers)
        await admin.start()
        try:
            offsets = await admin.list_consumer_group_offsets(self.settings.group_id)
        finally:
            await admin.close()
        found = offsets.get(TopicPartition(self.topic, partition))
        return found.offset if found and found.offset >= 0 else None


@asynccontextmanager
async def group_on(bootstrap_servers: str, unique: Callable[[str], str]) -> AsyncIterator[Group]:
    topic = unique("jobs")
    await create_topic(bootstrap_servers, topic, partitions=2)
    settings = KafkaSettings(
        bootstrap_servers=bootstrap_servers,
        group_id=unique("group"),
        session_timeout_ms=6_000,
        heartbeat_interval_ms=300,
        metadata_max_age_ms=500,
    )
    async with AIOKafkaProducer(bootstrap_servers=bootstrap_servers) as producer:
        yield Group(bootstrap_servers, topic, settings, producer)


@pytest.fixture
async def group(embedded_broker: str, unique: Callable[[str], str]) -> AsyncIterator[Group]:
    async with group_on(embedded_broker, unique) as group:
        yield group


@pytest.fixture
async def kafka_group(kafka_broker: str, unique: Callable[[str], str]) -> AsyncIterator[Group]:
    """The embedded broker refuses commits in a rebalance as if the member were unknown, and never evicts a member."""
    async with group_on(kafka_broker, unique) as group:
        yield group


async def eventually(holds: Callable[[], bool] | Callable[[], Awaitable[bool]], timeout_s: float = 40) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            answer = holds()
            if await answer if isinstance(answer, Awaitable) else answer:
                return
            await asyncio.sleep(0.05)


async def test_commits_only_what_is_finished_without_a_gap(group: Group) -> None:
    await group.send(0, 4)
    async with group.member() as member:
        await eventually(lambda: len(member.taken) == 4)
        for offset in (0, 1, 3):
            assert member.taken[0, offset].complete()
        await member.source.commit()
        assert await group.committed(0) == 2
        assert not await member.source.is_drained()
        member.taken[0, 2].complete()
        await member.source.commit()
        assert await group.committed(0) == 4
        assert await member.source.is_drained()


async def test_commits_that_work_again_are_logged_once(
    group: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(*_: object) -> None:
        raise KafkaConnectionError

    caplog.set_level("INFO", "nanovllm")
    await group.send(0, 1)
    async with group.member() as member:
        await eventually(lambda: len(member.taken) == 1)
        member.taken[0, 0].complete()
        with monkeypatch.context() as away:
            away.setattr(member.source._started(), "commit", refuse)
            await member.source.commit()
        assert "offsets were not committed this time: KafkaConnectionError" in caplog.text
        assert "committed again" not in caplog.text
        await member.source.commit()
        await member.source.commit()
        assert await group.committed(0) == 1
    assert caplog.text.count("offsets are committed again") == 1


async def test_what_was_not_finished_comes_again(group: Group) -> None:
    await group.send(0, 3)
    async with group.member() as first:
        await eventually(lambda: len(first.taken) == 3)
        first.taken[0, 2].complete()
        first.taken[0, 0].complete()
    async with group.member() as second:
        await eventually(lambda: set(second.taken) == {(0, 1), (0, 2)})


@pytest.mark.kafka
async def test_a_partition_that_left_is_fenced_and_one_that_stayed_keeps_its_jobs(kafka_group: Group) -> None:
    group = kafka_group
    await group.send(0, 3)
    await group.send(1, 3)
    async with group.member() as first:
        await eventually(lambda: len(first.taken) == 6)
        async with group.member() as second:
            await eventually(lambda: first.partitions | second.partitions == {0, 1} and bool(second.partitions))
            await eventually(lambda: len(first.partitions) == len(second.partitions) == 1)
            (kept,), (gone,) = first.partitions, second.partitions
            # The jobs of what left come to the new owner, and a late completion here moves nothing.
            await eventually(lambda: set(second.taken) == {(gone, 0), (gone, 1), (gone, 2)})
            assert len(first.lost) == 1
            assert not first.taken[gone, 0].is_current
            assert not first.taken[gone, 0].complete()
            # What stayed goes on where it was: nothing is delivered twice, and its completions count.
            assert first.taken[kept, 0].is_current
            assert first.taken[kept, 0].complete()
            assert first.repeated == 0
            await group.send(kept, 1)
            await eventually(lambda: (kept, 3) in first.taken)
            assert first.repeated == 0
            await first.source.commit()
            assert await group.committed(kept) == 1
            assert await group.committed(gone) in (0, None)


async def test_takes_no_more_than_the_room_and_the_span_allow(group: Group) -> None:
    await group.send(0, 10)
    async with group.member(max_out_of_order=3) as member:
        await eventually(lambda: len(member.taken) == 4)
        member.taken[0, 3].complete()
        await member.polled()
        assert len(member.taken) == 4
        member.taken[0, 0].complete()
        await eventually(lambda: len(member.taken) == 5)


async def test_no_room_takes_nothing_and_keeps_the_membership(group: Group) -> None:
    await group.send(0, 3)
    async with group.member(room=0) as member:
        await eventually(lambda: member.source.has_joined and len(member.partitions) == 2)
        await member.polled()
        assert member.taken == {}
        member.room = 2
        await eventually(lambda: len(member.taken) == 3)


async def test_after_stop_taking_nothing_is_taken_and_nothing_is_skipped(group: Group) -> None:
    async with group.member() as member:
        await eventually(lambda: len(member.partitions) == 2)
        member.source.stop_taking()
        await group.send(0, 2)
        await member.polled()
        assert member.taken == {}
        await member.source.commit()
        assert await group.committed(0) == 0


@pytest.mark.kafka
@pytest.mark.parametrize("while_consuming", [False, True])
async def test_offsets_that_retention_took_before_they_were_read_are_counted(
    kafka_group: Group, while_consuming: bool
) -> None:
    group = kafka_group
    async with group.member() as member:
        await eventually(lambda: len(member.partitions) == 2)
        if while_consuming:
            member.room = 0
            await group.send(0, 30)
            await group.delete_before(0, 20)
            member.room = 100
            await eventually(lambda: (0, 29) in member.taken)
            assert min(offset for _, offset in member.taken) <= 20
            # What was prefetched before it was removed is delivered; the rest is counted.
            taken = sum(offset < 20 for _, offset in member.taken)
            assert taken + member.overtaken == 20
        else:
            await member.source.commit()
    if not while_consuming:
        await group.send(0, 30)
        await group.delete_before(0, 20)
        async with group.member() as member:
            await eventually(lambda: (0, 29) in member.taken)
            assert min(offset for _, offset in member.taken) == 20
            assert member.overtaken == 20


@pytest.mark.kafka
async def test_a_static_member_that_comes_back_in_time_moves_no_partition(kafka_group: Group) -> None:
    group = kafka_group
    group.settings = group.settings.model_copy(update={"session_timeout_ms": 20_000})
    static = group.settings.model_copy(update={"group_instance_id": "worker-0"})
    async with group.member() as stays:
        await eventually(lambda: len(stays.partitions) == 2)
        async with group.member(settings=static) as first:
            await eventually(lambda: len(first.partitions) == len(stays.partitions) == 1)
            before = first.partitions
        async with group.member(settings=static) as again:
            await eventually(lambda: again.partitions == before)
        assert stays.partitions == {0, 1} - before


async def test_brokers_that_do_not_answer_are_a_systemic_error() -> None:
    async def drain() -> None:
        return None

    settings = KafkaSettings(bootstrap_servers="127.0.0.1:9", group_id="g")
    source = source_of(settings, "jobs", drain=drain, lost=lambda _: None)
    with pytest.raises(BrokersUnavailable):
        await source.start()


MODES = pytest.mark.parametrize("exactly_once", [False, True], ids=["at_least_once", "exactly_once"])
POLICIES = pytest.mark.parametrize("policy", ["earliest", "latest"])


@pytest.fixture
def latest(kafka_group: Group) -> Group:
    kafka_group.settings = kafka_group.settings.model_copy(update={"auto_offset_reset": "latest"})
    return kafka_group


@pytest.mark.kafka
@MODES
@POLICIES
async def test_jobs_in_partitions_that_are_added_are_read_from_the_first_one_on(
    kafka_group: Group, policy: str, exactly_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    group = kafka_group
    settings = group.settings.model_copy(update={"auto_offset_reset": policy})
    await group.send(0, 2)
    with caplog.at_level(logging.INFO, "nanovllm.pipeline.consuming.start_offset"):
        async with group.member(settings=settings, exactly_once=exactly_once) as member:
            await eventually(lambda: member.partitions == {0, 1})
            await group.add_partitions(4)
            await group.send(2, 3)
            await group.send(3, 3)
            await eventually(lambda: member.partitions == {0, 1, 2, 3})
            added = {(partition, offset) for partition in (2, 3) for offset in range(3)}
            await eventually(lambda: added <= member.taken.keys())
            waiting = {(0, 0), (0, 1)} if policy == "earliest" else set()
            assert member.taken.keys() == added | waiting
    # Others that have committed nothing yet are told on the same line.
    assert re.search(rf"{group.topic}: partitions [0-9, -]*3 are read from their beginning: ", caplog.text)


@pytest.mark.kafka
@MODES
async def test_a_group_that_began_at_the_end_and_has_read_nothing_skips_nothing_when_it_comes_back(
    latest: Group, exactly_once: bool
) -> None:
    await latest.send(0, 3)
    async with latest.member(exactly_once=exactly_once) as first:
        # No commit of the worker's: the start offset is committed before anything is read.
        await eventually(lambda: first.partitions == {0, 1})
        assert [await latest.committed(partition) for partition in (0, 1)] == [3, 0]
    await latest.send(0, 1)
    await latest.send(1, 1)
    async with latest.member(exactly_once=exactly_once) as second:
        await eventually(lambda: second.taken.keys() == {(0, 3), (1, 0)})
    assert first.taken == {}


@pytest.mark.kafka
async def test_partitions_that_were_added_while_no_worker_ran_are_read_from_their_beginning(latest: Group) -> None:
    async with latest.member() as first:
        await eventually(lambda: first.partitions == {0, 1})
    await latest.add_partitions(3)
    await latest.send(2, 2)
    # Two members, of which one never had another partition of the topic.
    async with latest.member() as second, latest.member() as third:
        await eventually(lambda: second.partitions | third.partitions == {0, 1, 2})
        await eventually(lambda: second.taken.keys() | third.taken.keys() == {(2, 0), (2, 1)})


@pytest.mark.kafka
async def test_a_group_that_has_read_other_topics_only_is_new_to_this_one(
    latest: Group, unique: Callable[[str], str]
) -> None:
    async with latest.member() as elsewhere:
        await eventually(lambda: elsewhere.partitions == {0, 1})
    latest.topic = unique("jobs")
    await create_topic(latest.bootstrap_servers, latest.topic, partitions=2)
    await latest.send(0, 2)
    async with latest.member() as member:
        await eventually(lambda: member.partitions == {0, 1})
        await latest.send(0, 1)
        await eventually(lambda: (0, 2) in member.taken)
        assert member.taken.keys() == {(0, 2)}


@pytest.mark.kafka
async def test_of_several_new_members_none_takes_the_others_offsets_for_those_of_an_old_group(latest: Group) -> None:
    await latest.send(0, 2)
    await latest.send(1, 2)
    mine, others = (TopicPartition(latest.topic, partition) for partition in (0, 1))
    places = StartOffsets("latest", Metrics())
    options = {"bootstrap_servers": latest.bootstrap_servers, "group_id": latest.settings.group_id}
    async with AIOKafkaConsumer(**options, enable_auto_commit=False) as consumer:
        consumer.assign([mine, others])
        await consumer._client._wait_on_metadata(latest.topic)
        await places.look(consumer, [latest.topic])
        await consumer.commit({others: OffsetAndMetadata(2, "")})
        assert await places.committed(consumer, [mine]) == {mine: 2}
        # Whoever comes later finds a group that has been here.
        later = StartOffsets("latest", Metrics())
        await later.look(consumer, [latest.topic])
        assert later._begin(TopicPartition(latest.topic, 7))[0] == "beginning"


@pytest.mark.kafka
async def test_retry_topics_are_read_in_full_by_a_new_group_as_well(latest: Group) -> None:
    await latest.send(0, 2)
    async with latest.member(delays_s={latest.topic: 0}) as member:
        await eventually(lambda: member.taken.keys() == {(0, 0), (0, 1)})


@pytest.mark.kafka
async def test_jobs_in_a_topic_that_was_made_anew_are_read_from_the_first_one_on(latest: Group) -> None:
    await latest.send(0, 5)
    async with latest.member() as member:
        await eventually(lambda: member.partitions == {0, 1})
        await latest.send(0, 1)
        await eventually(lambda: (0, 5) in member.taken)
        await latest.make_anew()
        await latest.send(0, 2)
        await eventually(lambda: member.taken.keys() == {(0, 5), (0, 0), (0, 1)})
