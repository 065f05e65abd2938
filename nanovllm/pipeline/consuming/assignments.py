"""The partitions of a group member: taking in what comes, fencing what leaves, committing what is finished."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass

from aiokafka import AIOKafkaConsumer, ConsumerRecord, OffsetAndMetadata, TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError

from nanovllm.errors import BrokersUnavailable, GroupInstanceFenced, InvalidJob, NanoVLLMError
from nanovllm.kafka.errors import is_fenced_instance
from nanovllm.kafka.raw_records import RawRecord
from nanovllm.kafka.topic_limits import TopicLimits
from nanovllm.pipeline.consuming.crash_guard import CrashGuard
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.pipeline.consuming.partition import AssignedPartition, ConsumedRecord
from nanovllm.pipeline.consuming.start_offset import StartOffsets
from nanovllm.pipeline.consuming.transactions import PartitionTransactions
from nanovllm.settings.kafka import KafkaSettings

logger = logging.getLogger(__name__)

COMMIT_TIMEOUT_S = 10.0

# Partitions that are taken in at the same time, and transactions that one commit has open. Each partition needs some
# requests, and with exactly_once a producer with connections of its own; a worker may get hundreds at once.
AT_ONCE = 16


@dataclass(eq=False)
class Assignments:
    """The partitions of one member. ``active`` ones are read; revoked ones are set aside, for they may come back.

    A partition that comes straight back with its committed offset unchanged keeps its ledger and the jobs at work; one
    that left is fenced.

    Args:
        lost: called with the ledger of each partition that left for good.
        exactly_once: fence each partition with a transactional producer of its own, which ends its jobs.
        crash_guard: told which partitions come and leave.
        limits: of the topics that transactions write.
    """

    settings: KafkaSettings
    start_offsets: StartOffsets
    _: KW_ONLY
    max_out_of_order: int
    lost: Callable[[PartitionLedger], None]
    exactly_once: bool
    crash_guard: CrashGuard | None
    limits: TopicLimits | None = None

    def __post_init__(self) -> None:
        self.active: dict[TopicPartition, AssignedPartition] = {}
        self.arriving: set[TopicPartition] = set()
        self._parted: dict[TopicPartition, AssignedPartition] = {}
        # The committed offsets of what arrives; None: not asked for yet.
        self._committed: dict[TopicPartition, int] | None = None
        # To be read from their beginning whatever is committed: that offset is of a topic that was deleted.
        self._made_anew: set[TopicPartition] = set()
        self._not_before: dict[TopicPartition, float] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._commit_lock = asyncio.Lock()
        self.uncommitted_since: float | None = None  # monotonic time of the first commit that failed, none since

    @property
    def are_new(self) -> bool:
        """Whether partitions have come whose committed offsets were not asked for yet."""
        return bool(self.arriving) and self._committed is None

    def assign(self, tps: Iterable[TopicPartition]) -> None:
        """Mark what has come, for ``take_in``, and fence what has not come back."""
        self.arriving, self._committed = set(tps), None
        self._made_anew &= self.arriving
        for tp in self._parted.keys() - self.arriving:
            self._let_go(self._parted.pop(tp))

    def revoke(self, tps: Iterable[TopicPartition]) -> dict[TopicPartition, AssignedPartition]:
        """Set the active ones of ``tps`` aside, and return them; forget what has not been taken in."""
        self.arriving, self._committed = set(), None
        leaving = {tp: self.active.pop(tp) for tp in tps if tp in self.active}
        self._parted |= leaving
        return leaving

    async def take_in(self, consumer: AIOKafkaConsumer, *, takes_work: bool) -> bool:
        """Take in some of the partitions that have come; returns whether others are left that could be now.

        Raises:
            KafkaError, BrokersUnavailable: the brokers refuse, or cannot be reached.
        """
        if self.exactly_once:
            self._give_up_fenced()
        now = time.monotonic()
        due = [tp for tp in sorted(self.arriving) if self._not_before.get(tp, 0.0) <= now]
        if not takes_work:
            # New partitions go to another worker soon; those that came back have jobs at work, which are committed.
            due = [tp for tp in due if tp in self._parted]
        if not due:
            return False
        arriving = self.arriving
        if self._committed is None:
            try:
                committed = await self.start_offsets.committed(consumer, arriving)
            except (CommitFailedError, IllegalStateError):
                return False  # a rebalance has begun meanwhile
            if self.arriving is not arriving:
                return False
            self._committed = {tp: offset for tp, offset in committed.items() if tp not in self._made_anew}
        committed = self._committed
        outcomes = await asyncio.gather(
            *(self._take_in_one(consumer, tp, committed.get(tp), arriving) for tp in due[:AT_ONCE]),
            return_exceptions=True,
        )
        _raise_first(outcomes)
        return len(due) > AT_ONCE

    def deliver(self, tp: TopicPartition, record: ConsumerRecord | RawRecord) -> ConsumedRecord:
        """``record`` of the active partition ``tp``, noted in its ledger."""
        assignment = self.active[tp]
        if record.offset < assignment.ledger.position:
            # The log was truncated or the topic made anew, and reading went back by the reset policy.
            logger.warning("%s-%d went back to offset %d", tp.topic, tp.partition, record.offset)
            assignment.ledger.fence()
            self.lost(assignment.ledger)
            assignment = AssignedPartition(self._ledger(record.offset), None, transactions=assignment.transactions)
            if assignment.transactions is not None:
                assignment.transactions.follow(assignment.ledger)
            self.active[tp] = assignment
        assignment.ledger.deliver(record.offset)
        unreadable = record.unreadable if isinstance(record, RawRecord) else None
        return ConsumedRecord(
            tp.topic,
            tp.partition,
            record.offset,
            record.timestamp if record.timestamp >= 0 else None,
            record.key,
            record.value or b"",
            tuple((name, value or b"") for name, value in record.headers),
            refusal=None if unreadable is None else InvalidJob(f"the record cannot be read: {unreadable}"),
            is_tombstone=record.value is None and unreadable is None,
            ledger=assignment.ledger,
            transactions=assignment.transactions,
        )

    def begin_anew(self, topic: str) -> None:
        """Take in ``topic`` from its beginning: it was deleted and made anew; its jobs at work are of the old one."""
        active = {tp for tp in self.active if tp.topic == topic}
        parted = {tp for tp in self._parted if tp.topic == topic}
        self._made_anew |= active | parted | {tp for tp in self.arriving if tp.topic == topic}
        for tp in parted:
            self._let_go(self._parted.pop(tp))
        for tp in active:
            self._let_go(self.active.pop(tp))
        self.arriving, self._committed = self.arriving | active, None

    async def reset_positions(self, consumer: AIOKafkaConsumer, tps: Iterable[TopicPartition]) -> None:
        """The log has nothing where ``tps`` stand: retention passed them, or the log was cut or made anew.

        Raises:
            KafkaError: the brokers refuse, or cannot be reached.
        """
        for tp in tps:
            if (assignment := self.active.get(tp)) is None:
                continue
            wanted = assignment.ledger.position
            offset = await self.start_offsets.near(consumer, tp, wanted)
            if offset == wanted:
                offset = await self.start_offsets.anew(consumer, tp, wanted)
            if self.active.get(tp) is assignment:
                consumer.seek(tp, offset)

    def note_positions(self, consumer: AIOKafkaConsumer) -> None:
        """The consumer's position passes offsets without a record; an idle partition commits it."""
        subscription = consumer._subscription.subscription
        states = None if subscription is None else subscription.assignment
        if states is None:
            return
        # Not by consumer.position(), a coroutine for each partition. One whose offset is being reset has none now.
        for tp, assignment in self.active.items():
            state = states.state_value(tp)
            if state is not None and state.has_valid_position:
                assignment.ledger.advance(state.position)

    async def commit(
        self, consumer: AIOKafkaConsumer, assignments: dict[TopicPartition, AssignedPartition], failure: str
    ) -> None:
        """Commit each watermark that has moved. ``failure`` is logged where it fails: the next commit covers it.

        Raises:
            GroupInstanceFenced: another worker has this one's place in the group.
        """
        try:
            async with asyncio.timeout(COMMIT_TIMEOUT_S), self._commit_lock:
                if self.exactly_once:
                    await _commit_transactions(assignments.values())
                else:
                    await _commit_offsets(consumer, assignments)
        except (KafkaError, NanoVLLMError, TimeoutError) as error:
            if isinstance(error, KafkaError) and is_fenced_instance(error):
                raise self.fenced_instance() from error
            self.uncommitted_since = self.uncommitted_since or time.monotonic()
            logger.warning("%s: %s", failure, type(error).__name__)
        else:
            self.uncommitted_since = None

    def fenced_instance(self) -> GroupInstanceFenced:
        """What ends a worker whose place in the group another one has."""
        name = self.settings.group_instance_id
        return GroupInstanceFenced(f"another member of group {self.settings.group_id} has group_instance_id {name!r}")

    async def part(self, leaving: Iterable[AssignedPartition]) -> None:
        """Clear the crash guard's records of partitions that leave."""
        if self.crash_guard is not None:
            try:
                async with asyncio.timeout(COMMIT_TIMEOUT_S):
                    await self.crash_guard.part([assignment.ledger for assignment in leaving])
            except (NanoVLLMError, TimeoutError) as error:
                logger.warning("what was at work may be suspected by its next owner: %s", type(error).__name__)

    async def close(self) -> None:
        """End the transactions of every partition, after the one that is under way."""
        for assignment in [*self.active.values(), *self._parted.values()]:
            self._close(assignment)
        await asyncio.gather(*self._closing)

    def _ledger(self, position: int) -> PartitionLedger:
        return PartitionLedger(position, max_out_of_order=self.max_out_of_order)

    def _let_go(self, assignment: AssignedPartition) -> None:
        assignment.ledger.fence()
        self.lost(assignment.ledger)
        self._close(assignment)

    def _close(self, assignment: AssignedPartition) -> None:
        if self.crash_guard is not None:
            self.crash_guard.forget(assignment.ledger)
        if assignment.transactions is not None:
            closing = asyncio.create_task(assignment.transactions.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _give_up_fenced(self) -> None:
        """Give up partitions whose producer another worker has started: one of the two learns late of a rebalance.

        If it is this one, the next heartbeat says so. If not, the partition is taken in anew after that time.
        """
        for tp, assignment in list(self.active.items()):
            if assignment.transactions is not None and assignment.transactions.is_fenced:
                self._let_go(self.active.pop(tp))
                self.arriving.add(tp)
                self._not_before[tp] = time.monotonic() + 2 * self.settings.heartbeat_interval_ms / 1000

    async def _take_in_one(
        self, consumer: AIOKafkaConsumer, tp: TopicPartition, committed: int | None, arriving: set[TopicPartition]
    ) -> None:
        try:
            if self.exactly_once:
                assignment = await self._adopt_or_fence(consumer, tp)
            else:
                assignment = await self._adopt_or_open(consumer, tp, committed)
        except IllegalStateError:
            return  # revoked meanwhile
        if self.crash_guard is not None:
            try:
                await self.crash_guard.take_in(tp, assignment.ledger)
            except NanoVLLMError as error:
                self._let_go(assignment)
                raise BrokersUnavailable(f"the record of jobs at work is out of reach: {error}") from error
        # Another set: the partition was assigned anew meanwhile, and its seek was forgotten with the assignment before.
        if self.arriving is arriving and tp in arriving and tp not in self.active:
            self.arriving.discard(tp)
            self._made_anew.discard(tp)
            self.active[tp] = assignment
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
        transactions = PartitionTransactions(tp, self.settings, consumer.committed, self.limits)
        try:
            await transactions.open()
            wanted = None if tp in self._made_anew else transactions.committed
            position = await self.start_offsets.near(consumer, tp, wanted)
            consumer.seek(tp, position)
        except BaseException:
            await transactions.close()
            raise
        ledger = self._ledger(position)
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
        position = await self.start_offsets.near(consumer, tp, committed)
        consumer.seek(tp, position)
        return AssignedPartition(self._ledger(position), committed)


async def _commit_transactions(assignments: Iterable[AssignedPartition]) -> None:
    at_once = asyncio.Semaphore(AT_ONCE)

    async def commit(assignment: AssignedPartition) -> None:
        async with at_once:
            await assignment.commit_position()

    _raise_first(await asyncio.gather(*map(commit, assignments), return_exceptions=True))


async def _commit_offsets(consumer: AIOKafkaConsumer, assignments: dict[TopicPartition, AssignedPartition]) -> None:
    numbers = {topic: consumer.partitions_for_topic(topic) or () for topic in {tp.topic for tp in assignments}}
    watermarks = {
        tp: assignment.ledger.watermark
        for tp, assignment in assignments.items()
        if assignment.ledger.watermark != assignment.committed
        # Of a topic that was deleted: aiokafka repeats such a commit until its time is over, and no other one passes.
        and tp.partition in numbers[tp.topic]
    }
    if not watermarks:
        return
    for tp, watermark in watermarks.items():
        assignments[tp].attempted = watermark
    try:
        await consumer.commit({tp: OffsetAndMetadata(watermark, "") for tp, watermark in watermarks.items()})
    except IllegalStateError as error:
        raise CommitFailedError("a partition left") from error
    for tp, watermark in watermarks.items():
        assignments[tp].committed = watermark


def _raise_first(outcomes: Iterable[object]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
