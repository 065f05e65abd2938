"""Records from Kafka, and offsets back to it. All that the worker must know about consumer groups is in this file."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, OffsetAndMetadata, TopicPartition
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)

from nanovllm.errors import BrokersUnavailable
from nanovllm.metrics import Metrics
from nanovllm.pipeline.delays import DelayedHeads
from nanovllm.pipeline.ledger import PartitionLedger
from nanovllm.pipeline.settings import KafkaSettings

logger = logging.getLogger(__name__)

# getmany() without partitions means all of them; asked for this one it returns nothing and still counts as a poll, so
# that a worker whose hands are full is not taken for dead (max_poll_interval_ms).
_NOWHERE = TopicPartition("", -1)

COMMIT_TIMEOUT_S = 10.0
POSITION_TIMEOUT_S = 0.2


@dataclass(frozen=True)
class Delivery:
    """One record, handed over once during one assignment of its partition."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int | None
    key: bytes | None
    value: bytes
    headers: tuple[tuple[str, bytes], ...] = ()
    ledger: PartitionLedger = field(kw_only=True, repr=False)

    @property
    def is_current(self) -> bool:
        """Whether its partition is still ours; if not, somebody else gets the record again."""
        return not self.ledger.is_fenced

    def settle(self) -> bool:
        """Note that it ended; False when its partition has left meanwhile."""
        return self.ledger.settle(self.offset)


@dataclass(eq=False)
class _Assignment:
    """A partition's ledger, and what is known about its committed offset."""

    ledger: PartitionLedger
    committed: int | None
    # A commit whose answer never came may have happened or not.
    attempted: int | None = None

    def is_done(self, end: int) -> bool:
        """Whether everything below ``end`` is finished and committed."""
        return self.ledger.in_flight == 0 and self.ledger.position >= end and self.committed == self.ledger.watermark


class JobSource(ConsumerRebalanceListener):
    """The jobs topic as one member of a consumer group.

    aiokafka stops heartbeats before it joins and starts them again only after ``on_partitions_assigned`` returns, and
    it swallows what is raised there: that callback only marks partitions, and ``poll`` takes each one in. Its assignors
    are eager: every rebalance revokes everything. A partition that comes straight back with its committed offset
    unchanged keeps its ledger and the jobs at work; one that left is fenced.

    Args:
        drain: awaited when partitions are about to leave; ends when the jobs at work are done or its budget is spent.
        drain_timeout_s: that budget; the group's timeouts are derived from it.
        lost: called with the ledger of each partition that left for good.
        metrics: where records that retention removed before anybody read them are counted.
        delays_s: topics whose records are handed over so many seconds after they were written.
    """

    def __init__(
        self,
        settings: KafkaSettings,
        topics: Sequence[str],
        *,
        max_out_of_order: int,
        drain: Callable[[], Awaitable[None]],
        lost: Callable[[PartitionLedger], None],
        drain_timeout_s: float = 0.0,
        metrics: Metrics | None = None,
        delays_s: Mapping[str, int] | None = None,
    ) -> None:
        self._settings = settings
        self._topics = list(topics)
        self._max_out_of_order = max_out_of_order
        self._drain = drain
        self._lost = lost
        self._drain_timeout_s = drain_timeout_s
        self._metrics = metrics or Metrics()
        self._waits = DelayedHeads(delays_s or {})
        self._consumer: AIOKafkaConsumer | None = None
        self._active: dict[TopicPartition, _Assignment] = {}
        self._parted: dict[TopicPartition, _Assignment] = {}
        self._arriving: set[TopicPartition] = set()
        self._commit_lock = asyncio.Lock()
        self._has_joined = False
        self._takes_work = True

    @property
    def has_joined(self) -> bool:
        """Whether the group has given this member its partitions (which may be none)."""
        return self._has_joined

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

    async def start(self) -> None:
        """Connect and join the group.

        Raises:
            BrokersUnavailable: no broker answers, or it refuses the login.
        """
        consumer = AIOKafkaConsumer(
            **self._settings.consumer_kwargs(drain_timeout_s=self._drain_timeout_s),
            partition_assignment_strategy=(StickyPartitionAssignor,),
        )
        consumer.subscribe(self._topics, listener=self)
        try:
            await consumer.start()
        except KafkaError as error:
            with suppress(KafkaError):
                await consumer.stop()
            raise BrokersUnavailable(f"Kafka cannot be consumed from: {type(error).__name__}") from error
        self._consumer = consumer

    async def poll(self, max_records: int, timeout_ms: int) -> list[Delivery]:
        """At most ``max_records`` new records, waiting at most ``timeout_ms`` for the first (longer in a rebalance).

        0 takes none and keeps the membership alive. Never cancel it: aiokafka would no longer notice a dead worker.
        Only one task may call it.

        Raises:
            BrokersUnavailable: Kafka refuses or cannot be reached.
        """
        consumer = self._started()
        try:
            await self._take_in()
            asked = self._with_room() if self._takes_work and max_records > 0 else []
            limit = min([max_records, *(self._active[tp].ledger.room for tp in asked)]) if asked else 1
            try:
                batches = await consumer.getmany(*(asked or [_NOWHERE]), timeout_ms=timeout_ms, max_records=limit)
            except OffsetOutOfRangeError as error:
                await self._find_places(error.args[0])
                return []
            except NoOffsetForPartitionError:
                return []  # found before we sought: the place is known by now
        except KafkaError as error:
            raise BrokersUnavailable(f"Kafka cannot be consumed from: {type(error).__name__}") from error
        deliveries: list[Delivery] = []
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
        await self._note_positions()
        return deliveries

    def stop_taking(self) -> None:
        """Take no more records; polls go on keeping the membership alive."""
        self._takes_work = False

    async def commit(self) -> None:
        """Commit each partition's watermark where it has moved. A failure is logged: the next commit covers it."""
        try:
            async with asyncio.timeout(COMMIT_TIMEOUT_S):
                await self._commit(self._active)
        except (KafkaError, TimeoutError) as error:
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
        if self._active:
            await self.commit()
        await self._consumer.stop()
        self._has_joined = False

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Stop taking, let the jobs at work end within the budget, commit, and set the partitions aside."""
        revoked = set(revoked)
        self._has_joined = False
        self._arriving = set()
        leaving = {tp: self._active.pop(tp) for tp in revoked if tp in self._active}
        self._parted |= leaving
        if not leaving:
            return
        if any(assignment.ledger.in_flight for assignment in leaving.values()):
            await self._drain()
        try:
            async with asyncio.timeout(COMMIT_TIMEOUT_S):
                await self._commit(leaving)
        except (KafkaError, TimeoutError) as error:
            # The embedded broker refuses every commit in a rebalance; what is not committed is done again.
            logger.warning("offsets of leaving partitions were not committed: %s", type(error).__name__)

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Mark what came, and fence what did not come back."""
        self._arriving = set(assigned)
        for tp in list(self._parted):
            if tp not in self._arriving:
                self._let_go(self._parted.pop(tp))
        self._has_joined = True

    def _started(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            raise RuntimeError("start() comes first")
        return self._consumer

    def _with_room(self) -> list[TopicPartition]:
        return [tp for tp, assignment in self._active.items() if assignment.ledger.room > 0 and self._waits.is_over(tp)]

    def _let_go(self, assignment: _Assignment) -> None:
        assignment.ledger.fence()
        self._lost(assignment.ledger)

    async def _take_in(self) -> None:
        consumer = self._started()
        for tp in sorted(self._arriving):
            committed = await consumer.committed(tp)
            if tp not in self._arriving or tp in self._active:
                continue
            try:
                assignment = await self._adopt_or_open(consumer, tp, committed)
            except IllegalStateError:
                continue  # revoked meanwhile
            if tp in self._arriving:
                self._arriving.discard(tp)
                self._active[tp] = assignment

    async def _adopt_or_open(
        self, consumer: AIOKafkaConsumer, tp: TopicPartition, committed: int | None
    ) -> _Assignment:
        """Always seeks: what was prefetched or handed over since the assignment began was not delivered."""
        before = self._parted.pop(tp, None)
        if before is not None:
            if committed in (before.committed, before.attempted):
                before.committed = committed
                consumer.seek(tp, before.ledger.position)
                return before
            self._let_go(before)
        position = await self._place(consumer, tp, committed)
        consumer.seek(tp, position)
        return _Assignment(PartitionLedger(position, max_out_of_order=self._max_out_of_order), committed)

    async def _place(self, consumer: AIOKafkaConsumer, tp: TopicPartition, wanted: int | None) -> int:
        """Where reading begins when it should begin at ``wanted`` (None: nobody has read here)."""
        beginning: int = (await consumer.beginning_offsets([tp]))[tp]
        if wanted is None:
            return await self._by_policy(consumer, tp, beginning)
        if wanted < beginning:
            logger.error(
                "%s-%d: retention removed the offsets %d to %d before they were read: jobs may be lost; "
                "raise the topic's retention, or add workers",
                *(tp.topic, tp.partition, wanted, beginning - 1),
            )
            self._metrics.overtaken.labels(tp.topic, tp.partition).inc(beginning - wanted)
        return max(wanted, beginning)

    async def _by_policy(self, consumer: AIOKafkaConsumer, tp: TopicPartition, beginning: int) -> int:
        if self._settings.auto_offset_reset == "earliest":
            return beginning
        end: int = (await consumer.end_offsets([tp]))[tp]
        return end

    async def _find_places(self, tps: Iterable[TopicPartition]) -> None:
        """The log has nothing where ``tps`` stand: retention passed them, or the log was cut or made anew."""
        consumer = self._started()
        for tp in tps:
            if (assignment := self._active.get(tp)) is None:
                continue
            wanted = assignment.ledger.position
            place = await self._place(consumer, tp, wanted)
            if place == wanted:
                place = await self._by_policy(consumer, tp, (await consumer.beginning_offsets([tp]))[tp])
            if self._active.get(tp) is assignment:
                consumer.seek(tp, place)

    def _deliver(self, tp: TopicPartition, record: object) -> Delivery:
        assignment = self._active[tp]
        offset: int = record.offset  # type: ignore[attr-defined]
        if offset < assignment.ledger.position:
            # The log was truncated or the topic made anew, and reading went back by the reset policy.
            logger.warning("%s-%d went back to offset %d", tp.topic, tp.partition, offset)
            self._let_go(assignment)
            assignment = _Assignment(PartitionLedger(offset, max_out_of_order=self._max_out_of_order), None)
            self._active[tp] = assignment
        assignment.ledger.deliver(offset)
        timestamp: int = record.timestamp  # type: ignore[attr-defined]
        return Delivery(
            tp.topic,
            tp.partition,
            offset,
            timestamp if timestamp >= 0 else None,
            record.key,  # type: ignore[attr-defined]
            record.value or b"",  # type: ignore[attr-defined]
            tuple((name, value or b"") for name, value in record.headers),  # type: ignore[attr-defined]
            ledger=assignment.ledger,
        )

    async def _note_positions(self) -> None:
        """The consumer's position passes offsets that nobody is ever given: an idle partition commits it."""
        consumer = self._started()
        with suppress(KafkaError, TimeoutError):
            # position() answers at once, except for a partition whose offset is being reset.
            async with asyncio.timeout(POSITION_TIMEOUT_S):
                for tp, assignment in list(self._active.items()):
                    position = await consumer.position(tp)
                    if self._active.get(tp) is assignment:
                        assignment.ledger.advance(position)

    async def _commit(self, assignments: dict[TopicPartition, _Assignment]) -> None:
        consumer = self._started()
        async with self._commit_lock:
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
