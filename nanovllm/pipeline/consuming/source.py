"""The source: records from one member of a consumer group, and offsets back to Kafka."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import (
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    UnknownTopicOrPartitionError,
)
from aiokafka.protocol.group import LeaveGroupRequest

from nanovllm.errors import BrokersUnavailable, GroupInstanceFenced, MissingTopic, SystemicError
from nanovllm.kafka.client import consumer_kwargs
from nanovllm.kafka.errors import is_fenced_instance
from nanovllm.kafka.paced_metadata import pace_metadata
from nanovllm.kafka.prefetched import Prefetched
from nanovllm.kafka.raw_records import RawRecord, read_raw
from nanovllm.kafka.unanswered import Unanswered
from nanovllm.pipeline.consuming.assignments import Assignments
from nanovllm.pipeline.consuming.delayed_partitions import DelayedPartitions
from nanovllm.pipeline.consuming.fair_poll import FairPoll
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.consuming.topic_shares import TopicSharesAssignor
from nanovllm.pipeline.consuming.topic_watch import INTERVAL_S, TopicWatch
from nanovllm.settings.kafka import KafkaSettings

logger = logging.getLogger(__name__)

POSITION_INTERVAL_S = 0.1
LEAVE_TIMEOUT_S = 3.0
LOSSES_OF_A_FENCED_MEMBER = 3


class JobSource(ConsumerRebalanceListener):
    """The jobs topic as one member of a consumer group.

    aiokafka stops heartbeats before it joins and starts them again only after ``on_partitions_assigned`` returns, and
    it swallows what is raised there: that callback only marks partitions, and ``poll`` takes each one in. Its assignors
    are eager: every rebalance revokes everything.

    Args:
        topics: what to read, and the lane of each; a lower one goes first.
        drain: awaited when partitions are about to leave; ends when the jobs at work are done or its budget is spent.
        drain_timeout_s: that budget; the group's timeouts are derived from it.
        delays_s: topics whose records are handed over so many seconds after they were written.
        watch: tells which topics are missing or were made anew.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        topics: Mapping[str, int],
        assignments: Assignments,
        *,
        drain: Callable[[], Awaitable[None]],
        drain_timeout_s: float,
        delays_s: Mapping[str, int],
        watch: TopicWatch,
    ) -> None:
        self._watch = watch
        self._settings = settings
        self.topics = tuple(topics)
        self._fair_poll = FairPoll(topics)
        self._drain = drain
        self._drain_timeout_s = drain_timeout_s
        self._delayed = DelayedPartitions(delays_s)
        self._assignments = assignments
        self._consumer: AIOKafkaConsumer | None = None
        self._unanswered: Unanswered | None = None
        self._has_joined = False
        self._takes_work = True
        self._positions_noted = 0.0
        self._lost_memberships: deque[float] = deque(maxlen=LOSSES_OF_A_FENCED_MEMBER)
        self._is_fenced = False

    @property
    def has_put_off(self) -> bool:
        """Whether there are partitions that only ``poll(put_off=True)`` reads."""
        return bool(self._fair_poll.put_off)

    @property
    def can_read_put_off(self) -> bool:
        """Whether one of them has room for records."""
        return any(self._room(tp) > 0 for tp in self._fair_poll.put_off)

    def put_off(self, last: ConsumedRecord, *, is_invalid: bool) -> None:
        """Read the partition of ``last`` by polls of its own after an invalid record, and as others after a job."""
        put_off = self._fair_poll.put_off
        if is_invalid and last.is_current:
            put_off.add(TopicPartition(last.topic, last.partition))
        elif put_off and not is_invalid:
            put_off.discard(TopicPartition(last.topic, last.partition))

    @property
    def has_joined(self) -> bool:
        """Whether the group has given this member its partitions (which may be none), and its brokers answer.

        A request that had no answer for as long as the group's session lasts is a membership that may be lost.
        """
        coordinator = self._consumer._coordinator if self._consumer else None
        # aiokafka forgets the coordinator when a heartbeat fails, and looks for it until it is back.
        has_coordinator = coordinator is not None and coordinator.coordinator_id is not None
        return self._has_joined and has_coordinator and self.silence_s < self._settings.session_timeout_ms / 1000

    @property
    def silence_s(self) -> float:
        """How long the oldest request to a broker has had no answer."""
        return self._unanswered.oldest_s if self._unanswered else 0.0

    @property
    def missing_topics(self) -> tuple[str, ...]:
        """Topics of ours that the brokers do not list."""
        return self._watch.missing

    @property
    def watermarks(self) -> dict[tuple[str, int], int]:
        """The offset up to which each partition of ours is finished."""
        return {(tp.topic, tp.partition): held.ledger.watermark for tp, held in self._assignments.active.items()}

    @property
    def lags(self) -> dict[tuple[str, int], int]:
        """Records of each partition of ours that are not finished, as far as the last fetch has told."""
        lags = {}
        for (topic, partition), watermark in self.watermarks.items():
            end = self._started().highwater(TopicPartition(topic, partition))
            if end is not None:
                lags[topic, partition] = max(0, end - watermark)
        return lags

    async def start(self, on_wait: Callable[[str], None] = lambda _: None) -> None:
        """Connect and join the group; a call that is cancelled leaves it again.

        ``on_wait`` is told what is waited for, each time that it changes.

        Raises:
            BrokersUnavailable: no broker answers, or it refuses the login.
            MissingTopic: a topic is missing.
        """
        consumer = AIOKafkaConsumer(
            **consumer_kwargs(self._settings, drain_timeout_s=self._drain_timeout_s),
            partition_assignment_strategy=(TopicSharesAssignor, StickyPartitionAssignor),
        )
        pace_metadata(consumer._client)
        self._unanswered = Unanswered(consumer._client)
        try:
            await self._join(consumer, on_wait)
        except BaseException as error:
            await self._leave(consumer)
            if isinstance(error, KafkaError):
                raise self._unavailable(error) from error
            raise
        self._consumer = consumer

    async def _join(self, consumer: AIOKafkaConsumer, on_wait: Callable[[str], None]) -> None:
        on_wait("the brokers")
        await consumer.start()
        for topic in self.topics:
            on_wait(f"topic {topic}, which the brokers do not list")
            try:
                await consumer._client._wait_on_metadata(topic)
            except UnknownTopicOrPartitionError as error:
                raise MissingTopic(f"topic {topic} is missing") from error
        on_wait(f"the coordinator of group {self._settings.group_id}")
        await self._assignments.start_offsets.look(consumer, self.topics)
        on_wait(f"partitions from group {self._settings.group_id}")
        consumer.subscribe(list(self.topics), listener=self)
        await consumer._subscription.wait_for_assignment()

    def _unavailable(self, error: KafkaError) -> BrokersUnavailable:
        servers = self._settings.bootstrap_servers
        return BrokersUnavailable(f"the brokers {servers} cannot be consumed from: {type(error).__name__}")

    async def _leave(self, consumer: AIOKafkaConsumer) -> None:
        """Leave the group and disconnect; gives up after ``LEAVE_TIMEOUT_S``."""
        if self._is_fenced and consumer._coordinator is not None:
            consumer._coordinator._coordination_task.cancel()
        # stop() first: aiokafka would join again when its JoinGroup ends and it is not being closed.
        ending = [asyncio.create_task(consumer.stop()), asyncio.create_task(self._end_join(consumer))]
        _, late = await asyncio.wait(ending, timeout=LEAVE_TIMEOUT_S)
        for task in late:
            task.cancel()
        for outcome in await asyncio.gather(*ending, return_exceptions=True):
            # In aiokafka 0.14 stop() ends in CancelledError where a fetch waits for its next attempt.
            if isinstance(outcome, Exception):
                logger.warning("the consumer group was not left in order: %s", type(outcome).__name__)
        # What stop() did not come to: open connections would keep their tasks.
        await consumer._client.close()

    async def _end_join(self, consumer: AIOKafkaConsumer) -> None:
        """Leave the group while a JoinGroup of ours is under way.

        aiokafka's stop() waits for the answer, which comes when all other members have drained and joined as well. A
        broker answers one request of a connection after another, so LeaveGroup goes over the other one.
        """
        coordinator = consumer._coordinator
        if coordinator is None or consumer._subscription.subscription is None:
            return
        is_joining = coordinator.need_rejoin(consumer._subscription.subscription)
        if is_joining and coordinator.member_id and self._settings.group_instance_id is None:
            leave = LeaveGroupRequest(self._settings.group_id, coordinator.member_id)
            with suppress(KafkaError):
                await consumer._client.send(coordinator.coordinator_id, leave)

    async def poll(
        self, max_records: int | Mapping[int, int], timeout_ms: int, *, put_off: bool = False
    ) -> list[ConsumedRecord]:
        """At most ``max_records`` new records, waiting at most ``timeout_ms`` for the first (longer in a rebalance).

        They are those of the lane whose turn it is, if any has some at hand; a mapping bounds each lane. 0 takes none
        and keeps the membership alive. ``put_off`` reads from partitions that were put off alone, and takes up again
        those that have no more at hand. Never cancel it: aiokafka would no longer notice a dead worker. Only one task
        may call it.

        Raises:
            BrokersUnavailable: Kafka refuses or cannot be reached.
            GroupInstanceFenced: another worker has this one's place in the group.
        """
        consumer, assignments = self._started(), self._assignments
        if self._is_fenced:
            raise assignments.fenced_instance()
        try:
            if assignments.are_new:
                # A topic that was made anew before is not taken for one that is made anew later, and read twice.
                await self._watch.look(consumer, self.lags)
            while self._watch.made_anew:
                assignments.begin_anew(self._watch.made_anew.pop())
            if await assignments.take_in(consumer, takes_work=self._takes_work):
                timeout_ms = 0
            try:
                batches = await self._take(consumer, max_records, timeout_ms, put_off=put_off)
            except OffsetOutOfRangeError as error:
                await assignments.reset_positions(consumer, error.args[0])
                return []
            except NoOffsetForPartitionError:
                return []  # raised before the seek: the offset is known by now
        except KafkaError as error:
            if is_fenced_instance(error):
                raise assignments.fenced_instance() from error
            raise self._unavailable(error) from error
        deliveries: list[ConsumedRecord] = []
        for tp, records in batches.items():
            # A partition that left or came back while we waited is read again from where its next owner, or we, stand.
            if tp not in assignments.active:
                continue
            if self._takes_work:
                due, head = self._delayed.split(tp, records)
                deliveries += [assignments.deliver(tp, record) for record in due]
                if head is not None:
                    consumer.seek(tp, head)
            else:
                # Asked for before the end was known. The position is committed: it must not stay behind them.
                consumer.seek(tp, records[0].offset)
        if time.monotonic() - self._positions_noted >= POSITION_INTERVAL_S:
            self._positions_noted = time.monotonic()
            assignments.note_positions(consumer)
        return deliveries

    async def watch_topics(self) -> None:
        """Look at the topics again and again; ``missing_topics`` and the next ``poll`` follow what was found."""
        while True:
            with suppress(KafkaError):  # the poll and the commits tell of brokers that do not answer
                await self._watch.look(self._started(), self.lags)
            await asyncio.sleep(INTERVAL_S)

    def stop_taking(self) -> None:
        """Take no more records; polls go on keeping the membership alive."""
        self._takes_work = False

    async def commit(self) -> None:
        """Commit each partition's watermark where it has moved. A failure is logged: the next commit covers it.

        Raises:
            BrokersUnavailable: no commit has succeeded for longer than the group's session lasts.
            GroupInstanceFenced: another worker has this one's place in the group.
        """
        if self._is_fenced:
            # A poll that waits for the group's offsets is not told: aiokafka reads them after the rebalance.
            raise self._assignments.fenced_instance()
        active = dict(self._assignments.active)
        before = self._assignments.uncommitted_since
        await self._assignments.commit(self._started(), active, "offsets were not committed this time")
        since = self._assignments.uncommitted_since
        late_s = self._settings.session_timeout_ms / 1000
        if since is not None and time.monotonic() - since > late_s:
            raise BrokersUnavailable(
                f"no offset was committed for longer than the session (kafka.session_timeout_ms) at the brokers "
                f"{self._settings.bootstrap_servers}"
            )
        if before is not None and since is None and (after_s := time.monotonic() - before) <= late_s:
            # A later one ends the fault that was raised, and that is logged.
            logger.info("offsets are committed again, after %.0f s", after_s)

    async def is_drained(self) -> bool:
        """Whether every record that is in our partitions now is finished and committed."""
        if not self._has_joined or self._assignments.arriving:
            return False
        held = dict(self._assignments.active)
        try:
            ends = await self._started().end_offsets(list(held)) if held else {}
        except KafkaError as error:
            logger.warning("the ends of the partitions are unknown: %s", type(error).__name__)
            return False
        # Compared after the await: partitions may have left or got records meanwhile.
        return self._assignments.active == held and all(one.is_done(ends[tp]) for tp, one in held.items())

    async def stop(self) -> None:
        """Commit and leave the group."""
        if self._consumer is None:
            return
        self._assignments.arriving = set()
        try:
            if self._assignments.active:
                with suppress(SystemicError):  # logged; what is not committed is done again
                    await self.commit()
                await self._assignments.part(self._assignments.active.values())
        finally:
            await asyncio.gather(self._assignments.close(), self._leave(self._consumer))
            self._has_joined = False

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Stop taking, let the jobs at work end within the budget, commit, and set the partitions aside."""
        was_member, self._has_joined = self._has_joined, False
        if was_member and self._has_been_replaced():
            self._is_fenced = True
            await asyncio.Event().wait()  # joining again would replace the other member in turn: _leave cancels this
        self._fair_poll.put_off.difference_update(revoked)
        leaving = self._assignments.revoke(revoked)
        if not leaving:
            return
        if any(assignment.ledger.in_flight for assignment in leaving.values()):
            await self._drain()
        # The embedded broker refuses every commit in a rebalance; what is not committed is done again.
        with suppress(GroupInstanceFenced):  # the next poll raises it
            await self._assignments.commit(self._started(), leaving, "offsets of leaving partitions were not committed")
        await self._assignments.part(leaving.values())

    def _has_been_replaced(self) -> bool:
        """Whether another member goes on taking this one's place.

        aiokafka 0.14 sends ``group.instance.id`` with JoinGroup and SyncGroup alone, so that the broker tells a member
        that was replaced of an unknown member id, as after a session that timed out. It forgets its id then.
        """
        coordinator = self._consumer._coordinator if self._consumer is not None else None
        if self._settings.group_instance_id is None or coordinator is None or coordinator.member_id:
            return False
        now, lost = time.monotonic(), self._lost_memberships
        lost.append(now)
        within_s = 2 * LOSSES_OF_A_FENCED_MEMBER * self._settings.session_timeout_ms / 1000
        return len(lost) == lost.maxlen and now - lost[0] < within_s

    def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Mark what came, and fence what did not come back."""
        if self._consumer is not None:
            self._assignments.start_offsets.recount(self._consumer)
        self._assignments.assign(assigned)
        self._has_joined = True

    def _started(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            raise RuntimeError("start() comes first")
        return self._consumer

    async def _take(
        self, consumer: AIOKafkaConsumer, max_records: int | Mapping[int, int], timeout_ms: int, *, put_off: bool
    ) -> Mapping[TopicPartition, Sequence[ConsumerRecord | RawRecord]]:
        prefetched, fair_poll = Prefetched(consumer), self._fair_poll
        if not (self._takes_work and max_records):
            await prefetched.idle(timeout_ms)
            return {}
        await prefetched.look()

        def room_of(tp: TopicPartition) -> int:
            return self._room(tp) if (tp in fair_poll.put_off) is put_off else 0

        if unparsed := {tp: room for tp in fair_poll.unparsed if (room := room_of(tp)) > 0}:
            fair_poll.unparsed -= unparsed.keys()
            positions = {tp: self._assignments.active[tp].ledger.position for tp in unparsed}
            return await read_raw(consumer, positions, min(unparsed.values()))
        batches = await fair_poll.take(prefetched, room_of, max_records)
        if not batches and timeout_ms and not fair_poll.unparsed:
            await prefetched.wait(timeout_ms)
            batches = await fair_poll.take(prefetched, room_of, max_records)
        if put_off:
            fair_poll.put_off.intersection_update(batches)
        return batches

    def _room(self, tp: TopicPartition) -> int:
        held = self._assignments.active.get(tp)
        return held.ledger.room if held is not None and self._delayed.is_over(tp) else 0
