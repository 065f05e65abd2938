"""The source: records from one member of a consumer group, and offsets back to Kafka."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, OffsetAndMetadata, TopicPartition
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    UnknownTopicOrPartitionError,
)
from aiokafka.protocol.group import LeaveGroupRequest

from nanovllm.errors import BrokersUnavailable, NanoVLLMError
from nanovllm.kafka.client import consumer_kwargs
from nanovllm.kafka.raw_records import PARSE_ERRORS, RawRecord, read_raw
from nanovllm.metrics import Metrics
from nanovllm.pipeline.consuming.crash_guard import CrashGuard
from nanovllm.pipeline.consuming.delayed_partitions import DelayedPartitions
from nanovllm.pipeline.consuming.fair_poll import Batches, FairPoll
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.pipeline.consuming.partition import AssignedPartition, ConsumedRecord
from nanovllm.pipeline.consuming.start_offset import StartOffsets
from nanovllm.pipeline.consuming.transactions import PartitionTransactions
from nanovllm.settings.kafka import KafkaSettings

logger = logging.getLogger(__name__)

# getmany() without partitions means all of them; asked for this one it returns nothing and still counts as a poll, so
# that a worker whose hands are full is not taken for dead (max_poll_interval_ms).
_NOWHERE = TopicPartition("", -1)

COMMIT_TIMEOUT_S = 10.0
POSITION_TIMEOUT_S = 0.2
POSITION_INTERVAL_S = 0.1
LEAVE_TIMEOUT_S = 3.0

# Partitions that one poll takes in, at the same time, and transactions that one commit has open. Each partition needs
# some requests, and with exactly_once a producer with connections of its own; a worker may get hundreds at once.
AT_ONCE = 16


class JobSource(ConsumerRebalanceListener):
    """The jobs topic as one member of a consumer group.

    aiokafka stops heartbeats before it joins and starts them again only after ``on_partitions_assigned`` returns, and
    it swallows what is raised there: that callback only marks partitions, and ``poll`` takes each one in. Its assignors
    are eager: every rebalance revokes everything. A partition that comes straight back with its committed offset
    unchanged keeps its ledger and the jobs at work; one that left is fenced.

    Args:
        topics: what to read, and the lane of each; a lower one goes first.
        drain: awaited when partitions are about to leave; ends when the jobs at work are done or its budget is spent.
        drain_timeout_s: that budget; the group's timeouts are derived from it.
        lost: called with the ledger of each partition that left for good.
        metrics: where records that retention removed before anybody read them are counted.
        delays_s: topics whose records are handed over so many seconds after they were written.
        crash_guard: told which partitions come and leave.
        exactly_once: fence each partition with a transactional producer of its own, which ends its jobs.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        topics: Mapping[str, int],
        *,
        max_out_of_order: int,
        drain: Callable[[], Awaitable[None]],
        lost: Callable[[PartitionLedger], None],
        drain_timeout_s: float = 0.0,
        metrics: Metrics | None = None,
        delays_s: Mapping[str, int] | None = None,
        exactly_once: bool = False,
        crash_guard: CrashGuard | None = None,
    ) -> None:
        self._settings = settings
        self._topics = list(topics)
        self._fair_poll = FairPoll(topics)
        self._max_out_of_order = max_out_of_order
        self._drain = drain
        self._lost = lost
        self._drain_timeout_s = drain_timeout_s
        self._start_offsets = StartOffsets(
            settings.auto_offset_reset, metrics or Metrics(), read_in_full=delays_s or {}
        )
        self._waits = DelayedPartitions(delays_s or {})
        self._consumer: AIOKafkaConsumer | None = None
        self._active: dict[TopicPartition, AssignedPartition] = {}
        self._parted: dict[TopicPartition, AssignedPartition] = {}
        self._arriving: set[TopicPartition] = set()
        # The committed offsets of what arrives; None: not asked for yet.
        self._committed: dict[TopicPartition, int] | None = None
        self._exactly_once = exactly_once
        self._crash_guard = crash_guard
        self._not_before: dict[TopicPartition, float] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._commit_lock = asyncio.Lock()
        self._has_joined = False
        self._takes_work = True
        self._positions_noted = 0.0

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics that it reads."""
        return tuple(self._topics)

    @property
    def has_put_off(self) -> bool:
        """Whether there are partitions that only ``poll(put_off=True)`` reads."""
        return self._fair_poll.has_put_off

    @property
    def can_read_put_off(self) -> bool:
        """Whether one of them has room for records."""
        return bool(self._asked(1, put_off=True))

    def put_off(self, last: ConsumedRecord) -> None:
        """What the partition of ``last`` holds can wait: it is read by polls of its own."""
        if last.is_current:
            self._fair_poll.put_off(TopicPartition(last.topic, last.partition))

    def take_up(self, last: ConsumedRecord) -> None:
        """The partition of ``last`` is read as others are."""
        self._fair_poll.take_up([TopicPartition(last.topic, last.partition)])

    @property
    def has_joined(self) -> bool:
        """Whether the group has given this member its partitions (which may be none), and its coordinator answers."""
        coordinator = self._consumer._coordinator if self._consumer else None
        # aiokafka forgets the coordinator when a heartbeat fails, and looks for it until it is back.
        return self._has_joined and coordinator is not None and coordinator.coordinator_id is not None

    @property
    def watermarks(self) -> dict[tuple[str, int], int]:
        """The offset up to which each partition of ours is finished."""
        return {(tp.topic, tp.partition): held.ledger.watermark for tp, held in self._active.items()}

    @property
    def lags(self) -> dict[tuple[str, int], int]:
        """Records of each partition of ours that are not finished, as far as the last fetch has told."""
        lags = {}
        for tp, held in self._active.items():
            end = self._consumer.highwater(tp) if self._consumer else None
            if end is not None:
                lags[tp.topic, tp.partition] = max(0, end - held.ledger.watermark)
        return lags

    async def start(self, on_wait: Callable[[str], None] = lambda _: None) -> None:
        """Connect and join the group; a call that is cancelled leaves it again.

        Args:
            on_wait: told what is waited for, each time that it changes.

        Raises:
            BrokersUnavailable: no broker answers, or it refuses the login; or a topic is missing.
        """
        consumer = AIOKafkaConsumer(
            **consumer_kwargs(self._settings, drain_timeout_s=self._drain_timeout_s),
            partition_assignment_strategy=(StickyPartitionAssignor,),
        )
        try:
            await self._join(consumer, on_wait)
        except KafkaError as error:
            await self._leave(consumer)
            raise BrokersUnavailable(f"Kafka cannot be consumed from: {type(error).__name__}") from error
        except BaseException:
            await self._leave(consumer)
            raise
        self._consumer = consumer

    async def _join(self, consumer: AIOKafkaConsumer, on_wait: Callable[[str], None]) -> None:
        on_wait("the brokers")
        await consumer.start()
        for topic in self._topics:
            on_wait(f"topic {topic}, which the brokers do not list")
            try:
                await consumer._client._wait_on_metadata(topic)
            except UnknownTopicOrPartitionError as error:
                raise BrokersUnavailable(
                    f"topic {topic} is missing; create it, or let `nanovllm topics create` make all of them"
                ) from error
        on_wait(f"the coordinator of group {self._settings.group_id}")
        await self._start_offsets.look(consumer, self._topics)
        on_wait(f"partitions from group {self._settings.group_id}")
        consumer.subscribe(self._topics, listener=self)
        await consumer._subscription.wait_for_assignment()

    async def _leave(self, consumer: AIOKafkaConsumer) -> None:
        """Leave the group and disconnect; gives up after ``LEAVE_TIMEOUT_S``."""
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
        """
        consumer = self._started()
        try:
            if await self._take_in():
                timeout_ms = 0
            asked = self._asked(max_records, put_off=put_off) if self._takes_work else {}
            try:
                batches = (
                    await self._fair_poll.take(consumer, asked, timeout_ms)
                    if asked
                    else await _keep_alive(consumer, timeout_ms)
                )
            except OffsetOutOfRangeError as error:
                await self._reset_positions(error.args[0])
                return []
            except NoOffsetForPartitionError:
                return []  # raised before the seek: the offset is known by now
            except PARSE_ERRORS:
                positions = {tp: self._active[tp].ledger.position for tp in asked if tp in self._active}
                batches = await read_raw(consumer, positions, min(asked.values()))
        except KafkaError as error:
            raise BrokersUnavailable(f"Kafka cannot be consumed from: {type(error).__name__}") from error
        if put_off:
            self._fair_poll.take_up(asked.keys() - batches.keys())
        deliveries: list[ConsumedRecord] = []
        for tp, records in batches.items():
            # A partition that left or came back while we waited is read again from where its next owner, or we, stand.
            if tp not in self._active:
                continue
            if self._takes_work:
                due, head = self._waits.split(tp, records)
                deliveries += [self._deliver(tp, record) for record in due]
                if head is not None:
                    consumer.seek(tp, head)
            else:
                # Asked for before the end was known. The position is committed: it must not stay behind them.
                consumer.seek(tp, records[0].offset)
        if time.monotonic() - self._positions_noted >= POSITION_INTERVAL_S:
            await self._note_positions()
        return deliveries

    def stop_taking(self) -> None:
        """Take no more records; polls go on keeping the membership alive."""
        self._takes_work = False

    async def commit(self) -> None:
        """Commit each partition's watermark where it has moved. A failure is logged: the next commit covers it."""
        try:
            async with asyncio.timeout(COMMIT_TIMEOUT_S):
                await self._commit(dict(self._active))
        except (KafkaError, NanoVLLMError, TimeoutError) as error:
            logger.warning("offsets were not committed this time: %s", type(error).__name__)

    async def is_drained(self) -> bool:
        """Whether every record that is in our partitions now is finished and committed."""
        consumer = self._started()
        if not self._has_joined or self._arriving:
            return False
        held = dict(self._active)
        try:
            ends = await consumer.end_offsets(list(held)) if held else {}
        except KafkaError as error:
            logger.warning("the ends of the partitions are unknown: %s", type(error).__name__)
            return False
        # Compared after the await: partitions may have left or got records meanwhile.
        return self._active == held and all(assignment.is_done(ends[tp]) for tp, assignment in held.items())

    async def stop(self) -> None:
        """Commit and leave the group."""
        if self._consumer is None:
            return
        self._forget_arrivals()
        try:
            if self._active:
                await self.commit()
                await self._part(list(self._active.values()))
        finally:
            for assignment in [*self._active.values(), *self._parted.values()]:
                self._close(assignment)
            await asyncio.gather(*self._closing, self._leave(self._consumer))
            self._has_joined = False

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Stop taking, let the jobs at work end within the budget, commit, and set the partitions aside."""
        revoked = set(revoked)
        self._has_joined = False
        self._forget_arrivals()
        self._fair_poll.take_up(revoked)
        leaving = {tp: self._active.pop(tp) for tp in revoked if tp in self._active}
        self._parted |= leaving
        if not leaving:
            return
        if any(assignment.ledger.in_flight for assignment in leaving.values()):
            await self._drain()
        try:
            async with asyncio.timeout(COMMIT_TIMEOUT_S):
                await self._commit(leaving)
        except (KafkaError, NanoVLLMError, TimeoutError) as error:
            # The embedded broker refuses every commit in a rebalance; what is not committed is done again.
            logger.warning("offsets of leaving partitions were not committed: %s", type(error).__name__)
        await self._part(leaving.values())

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Mark what came, and fence what did not come back."""
        self._forget_arrivals()
        self._arriving = set(assigned)
        if self._consumer is not None:
            self._start_offsets.recount(self._consumer)
        for tp in list(self._parted):
            if tp not in self._arriving:
                self._let_go(self._parted.pop(tp))
        self._has_joined = True

    def _forget_arrivals(self) -> None:
        self._arriving = set()
        self._committed = None

    def _started(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            raise RuntimeError("start() comes first")
        return self._consumer

    def _asked(self, max_records: int | Mapping[int, int], *, put_off: bool) -> dict[TopicPartition, int]:
        free = {tp: held.ledger.room for tp, held in self._active.items() if self._waits.is_over(tp)}
        return self._fair_poll.rooms(free, max_records, put_off=put_off)

    def _let_go(self, assignment: AssignedPartition) -> None:
        assignment.ledger.fence()
        self._lost(assignment.ledger)
        self._close(assignment)

    async def _part(self, leaving: Iterable[AssignedPartition]) -> None:
        if self._crash_guard is not None:
            try:
                async with asyncio.timeout(COMMIT_TIMEOUT_S):
                    await self._crash_guard.part([assignment.ledger for assignment in leaving])
            except (NanoVLLMError, TimeoutError) as error:
                logger.warning("what was at work may be suspected by its next owner: %s", type(error).__name__)

    def _close(self, assignment: AssignedPartition) -> None:
        if self._crash_guard is not None:
            self._crash_guard.forget(assignment.ledger)
        if assignment.transactions is not None:
            closing = asyncio.create_task(assignment.transactions.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _give_up_fenced(self) -> None:
        """Give up partitions whose producer another worker has started: one of the two learns late of a rebalance.

        If it is this one, the next heartbeat says so. If not, the partition is taken in anew after that time.
        """
        for tp, assignment in list(self._active.items()):
            if assignment.transactions is not None and assignment.transactions.is_fenced:
                self._let_go(self._active.pop(tp))
                self._arriving.add(tp)
                self._not_before[tp] = time.monotonic() + 2 * self._settings.heartbeat_interval_ms / 1000

    async def _take_in(self) -> bool:
        """Take in some of the partitions that have come; returns whether others are left that could be now."""
        consumer = self._started()
        self._give_up_fenced()
        now = time.monotonic()
        due = [tp for tp in sorted(self._arriving) if self._not_before.get(tp, 0.0) <= now]
        if not self._takes_work:
            # New partitions go to another worker soon; those that came back have jobs at work, which are committed.
            due = [tp for tp in due if tp in self._parted]
        if not due:
            return False
        if self._committed is None:
            arriving = self._arriving
            try:
                committed = await self._start_offsets.committed(consumer, arriving)
            except (CommitFailedError, IllegalStateError):
                return False  # a rebalance has begun meanwhile
            if self._arriving is not arriving:
                return False
            self._committed = committed
        committed = self._committed
        outcomes = await asyncio.gather(
            *(self._take_in_one(consumer, tp, committed.get(tp)) for tp in due[:AT_ONCE]), return_exceptions=True
        )
        _raise_first(outcomes)
        return len(due) > AT_ONCE

    async def _take_in_one(self, consumer: AIOKafkaConsumer, tp: TopicPartition, committed: int | None) -> None:
        try:
            if self._exactly_once:
                assignment = await self._adopt_or_fence(consumer, tp)
            else:
                assignment = await self._adopt_or_open(consumer, tp, committed)
        except IllegalStateError:
            return  # revoked meanwhile
        if self._crash_guard is not None:
            try:
                await self._crash_guard.take_in(tp, assignment.ledger)
            except NanoVLLMError as error:
                self._let_go(assignment)
                raise BrokersUnavailable(f"the record of jobs at work is out of reach: {error}") from error
        if tp in self._arriving and tp not in self._active:
            self._arriving.discard(tp)
            self._active[tp] = assignment
        else:
            self._let_go(assignment)

    async def _adopt_or_fence(self, consumer: AIOKafkaConsumer, tp: TopicPartition) -> AssignedPartition:
        """With exactly_once: the producer first, then the committed offset, then records. Any other order repeats."""
        before = self._parted.get(tp)
        if before is not None and before.transactions is not None:
            is_unchanged = await before.transactions.open()
            if self._parted.get(tp) is before:
                if is_unchanged:
                    consumer.seek(tp, before.ledger.position)
                    return self._parted.pop(tp)
                self._let_go(self._parted.pop(tp))
        transactions = PartitionTransactions(tp, self._settings, consumer.committed)
        try:
            await transactions.open()
            position = await self._start_offsets.near(consumer, tp, transactions.committed)
            consumer.seek(tp, position)
        except BaseException:
            await transactions.close()
            raise
        ledger = PartitionLedger(position, max_out_of_order=self._max_out_of_order)
        transactions.follow(ledger)
        return AssignedPartition(ledger, transactions.committed, transactions=transactions)

    async def _adopt_or_open(
        self, consumer: AIOKafkaConsumer, tp: TopicPartition, committed: int | None
    ) -> AssignedPartition:
        """Always seeks: what was prefetched or handed over since the assignment began was not delivered."""
        before = self._parted.get(tp)
        if before is not None:
            if committed in (before.committed, before.attempted):
                consumer.seek(tp, before.ledger.position)
                before.committed = committed
                return self._parted.pop(tp)
            self._let_go(self._parted.pop(tp))
        position = await self._start_offsets.near(consumer, tp, committed)
        consumer.seek(tp, position)
        return AssignedPartition(PartitionLedger(position, max_out_of_order=self._max_out_of_order), committed)

    async def _reset_positions(self, tps: Iterable[TopicPartition]) -> None:
        """The log has nothing where ``tps`` stand: retention passed them, or the log was cut or made anew."""
        consumer = self._started()
        for tp in tps:
            if (assignment := self._active.get(tp)) is None:
                continue
            wanted = assignment.ledger.position
            offset = await self._start_offsets.near(consumer, tp, wanted)
            if offset == wanted:
                offset = await self._start_offsets.anew(consumer, tp, wanted)
            if self._active.get(tp) is assignment:
                consumer.seek(tp, offset)

    def _deliver(self, tp: TopicPartition, record: object) -> ConsumedRecord:
        assignment = self._active[tp]
        offset: int = record.offset  # type: ignore[attr-defined]
        if offset < assignment.ledger.position:
            # The log was truncated or the topic made anew, and reading went back by the reset policy.
            logger.warning("%s-%d went back to offset %d", tp.topic, tp.partition, offset)
            ledger = PartitionLedger(offset, max_out_of_order=self._max_out_of_order)
            assignment.ledger.fence()
            self._lost(assignment.ledger)
            assignment = AssignedPartition(ledger, None, transactions=assignment.transactions)
            if assignment.transactions is not None:
                assignment.transactions.follow(ledger)
            self._active[tp] = assignment
        assignment.ledger.deliver(offset)
        timestamp: int = record.timestamp  # type: ignore[attr-defined]
        return ConsumedRecord(
            tp.topic,
            tp.partition,
            offset,
            timestamp if timestamp >= 0 else None,
            record.key,  # type: ignore[attr-defined]
            record.value or b"",  # type: ignore[attr-defined]
            tuple((name, value or b"") for name, value in record.headers),  # type: ignore[attr-defined]
            unreadable=record.unreadable if isinstance(record, RawRecord) else None,
            ledger=assignment.ledger,
            transactions=assignment.transactions,
        )

    async def _note_positions(self) -> None:
        """The consumer's position passes offsets without a record; an idle partition commits it."""
        consumer = self._started()
        self._positions_noted = time.monotonic()
        with suppress(KafkaError, TimeoutError):
            # position() answers at once, except for a partition whose offset is being reset.
            async with asyncio.timeout(POSITION_TIMEOUT_S):
                for tp, assignment in list(self._active.items()):
                    position = await consumer.position(tp)
                    if self._active.get(tp) is assignment:
                        assignment.ledger.advance(position)

    async def _commit(self, assignments: dict[TopicPartition, AssignedPartition]) -> None:
        consumer = self._started()
        async with self._commit_lock:
            if self._exactly_once:
                at_once = asyncio.Semaphore(AT_ONCE)
                _raise_first(
                    await asyncio.gather(
                        *(_commit_position(assignment, at_once) for assignment in assignments.values()),
                        return_exceptions=True,
                    )
                )
                return
            moved = {
                tp: (assignment, assignment.ledger.watermark)
                for tp, assignment in assignments.items()
                if assignment.ledger.watermark != assignment.committed
            }
            if not moved:
                return
            for assignment, watermark in moved.values():
                assignment.attempted = watermark
            try:
                await consumer.commit({tp: OffsetAndMetadata(watermark, "") for tp, (_, watermark) in moved.items()})
            except IllegalStateError as error:
                raise CommitFailedError("a partition left") from error
            for assignment, watermark in moved.values():
                assignment.committed = watermark


async def _commit_position(assignment: AssignedPartition, at_once: asyncio.Semaphore) -> None:
    async with at_once:
        await assignment.commit_position()


def _raise_first(outcomes: Iterable[object]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


async def _keep_alive(consumer: AIOKafkaConsumer, timeout_ms: int) -> Batches:
    """Poll for nothing."""
    batches: Batches = await consumer.getmany(_NOWHERE, timeout_ms=timeout_ms)
    return batches
