"""Records that are no jobs: their dead letters go out together, and their offsets are settled together.

A producer that has gone wrong sends thousands of them, and good jobs lie behind and beside them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from nanovllm.errors import MessageTooLarge, NanoVLLMError
from nanovllm.kafka.batch_send import BREATH
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.metrics import Metrics
from nanovllm.pipeline.admission.admission import Reservation
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.failure.dead_letter_limit import DeadLetterLimit
from nanovllm.pipeline.stages.context import JobContext, dead_letter_class
from nanovllm.pipeline.stages.publish import OutgoingRecords
from nanovllm.sinks.kafka import KafkaSink

logger = logging.getLogger(__name__)

MAX_TOGETHER = 128
TOLD_PER_S = 3

Persist = Callable[[Callable[[], Awaitable[None]], str, JobContext], Awaitable[None]]


@dataclass(frozen=True)
class InvalidRecord:
    """A record that is no job, and why; its ``context`` is unset where it could not be read at all."""

    delivery: ConsumedRecord
    error: NanoVLLMError
    context: JobContext | None = None

    def is_like(self, other: InvalidRecord) -> bool:
        """Whether the dead letters of two records of one partition differ in their source alone."""
        return (
            self.context is other.context is None
            and type(self.error) is type(other.error)
            and self.error.args == other.error.args
            and self.error.__cause__ is other.error.__cause__ is None
            and self.delivery.headers == other.delivery.headers
        )


@dataclass
class _Group:
    """Records of one partition that were refused at the same time."""

    refused: Sequence[InvalidRecord]
    reservation: Reservation


class InvalidRecords:
    """The refused records of each partition, until their dead letters are acknowledged.

    Args:
        context_of: begins a record's way where it has none.
        persist: repeats what may succeed later; see ``Stages``.
    """

    def __init__(
        self,
        outgoing: OutgoingRecords,
        sink: KafkaSink,
        metrics: Metrics,
        dead_letter_limit: DeadLetterLimit,
        *,
        context_of: Callable[[ConsumedRecord], JobContext],
        persist: Persist,
    ) -> None:
        self._outgoing = outgoing
        self._sink = sink
        self._metrics = metrics
        self._dead_letter_limit = dead_letter_limit
        self._context_of = context_of
        self._persist = persist
        self._pending: dict[PartitionLedger, deque[_Group]] = {}
        self._told_since = 0.0
        self._told = 0

    def add(self, ledger: PartitionLedger, refused: Sequence[InvalidRecord], reservation: Reservation) -> bool:
        """Some more of a partition; True when it had none, so that somebody must ``work_off`` them."""
        is_first = ledger not in self._pending
        self._pending.setdefault(ledger, deque()).append(_Group(refused, reservation))
        return is_first

    def drop(self, ledger: PartitionLedger) -> int:
        """Forget what is left of a partition, and return how many there were: they go back to Kafka."""
        left = self._pending.pop(ledger, ())
        for group in left:
            group.reservation.release()
        return sum(len(group.refused) for group in left)

    async def work_off(self, ledger: PartitionLedger) -> None:
        """Return when the partition has none left. What is cut short stays, to be dropped.

        Raises:
            PoisonLimitReached: the next one would be one too many; those before it are settled.
        """
        pending, untold = self._pending[ledger], 0
        while pending:
            groups = _first_groups(pending, MAX_TOGETHER)
            refused = [one for group in groups for one in group.refused]
            allowed = refused[: self._dead_letter_limit.bury_up_to(len(refused))]
            if allowed:
                await self._bury(allowed)
                untold += self._tell(allowed)
            if len(allowed) < len(refused):
                pending[0].refused = refused[len(allowed) :]
                raise self._dead_letter_limit.reached()
            for group in groups:
                pending.popleft()
                group.reservation.release()
        del self._pending[ledger]
        if untold:
            logger.warning("%d more records in a row are dead letters", untold)

    async def _bury(self, refused: Sequence[InvalidRecord]) -> None:
        first = refused[0].context or self._context_of(refused[0].delivery)
        letters = await self._letters(refused, first)
        transactions = first.delivery.transactions
        with first.stage("publish"):
            if transactions is None:
                await self._publish(letters, first)
            else:
                outputs = {one.delivery.offset: [letter] for one, letter in zip(refused, letters, strict=True)}
                await self._persist(lambda: transactions.release_all(outputs), "kafka producer", first)
        for one in refused:
            one.delivery.settle()
        self._observe(refused, first, letters[0].topic)

    async def _publish(self, letters: Sequence[OutgoingRecord], first: JobContext) -> None:
        try:
            await self._persist(lambda: self._sink.publish(letters), "kafka producer", first)
        except MessageTooLarge:
            if len(letters) == 1:
                raise
            # A topic whose limit nobody told us may take each of them alone.
            for letter in letters:
                await self._publish([letter], first)

    async def _letters(self, refused: Sequence[InvalidRecord], first: JobContext) -> list[OutgoingRecord]:
        letters: list[OutgoingRecord] = []
        for place, one in enumerate(refused):
            letter = None
            if place and one.is_like(refused[place - 1]):
                letter = self._outgoing.another_dead_letter(one.delivery, letters[-1])
            if letter is None:
                context = first if place == 0 else one.context or self._context_of(one.delivery)
                context.fail(one.error)
                letter = self._outgoing.dead_letter(context, one.error)
            letters.append(letter)
            if place % BREATH == BREATH - 1:
                await asyncio.sleep(0)
        return letters

    def _observe(self, refused: Sequence[InvalidRecord], first: JobContext, topic: str) -> None:
        metrics = self._metrics
        metrics.sent.labels(topic).inc(len(refused))
        metrics.jobs.labels("dead_letter").inc(len(refused))
        for kind, count in Counter(type(one.error) for one in refused).items():
            metrics.dead_letters.labels(dead_letter_class(kind), kind.code, "receive").inc(count)
        # One for all: they went the same way at the same time.
        metrics.process_seconds.observe(first.elapsed_s)
        for stage, seconds in first.seconds.items():
            metrics.stage_seconds.labels(stage).observe(seconds)
        if first.waited_in_kafka_s is not None:
            metrics.stage_seconds.labels("kafka").observe(first.waited_in_kafka_s)

    def _tell(self, refused: Sequence[InvalidRecord]) -> int:
        """Name a few each second; returns how many were not named."""
        if (now := time.monotonic()) - self._told_since >= 1.0:
            self._told_since, self._told = now, 0
        named = refused[: max(0, TOLD_PER_S - self._told)]
        self._told += len(named)
        for one in named:
            delivery, error = one.delivery, one.error
            place = (delivery.topic, delivery.partition, delivery.offset)
            logger.warning("%s:%d:%d is a dead letter: %s in stage receive: %r", *place, error.code, str(error))
        return len(refused) - len(named)


def _first_groups(pending: deque[_Group], at_most: int) -> list[_Group]:
    """The first ones, with ``at_most`` records together unless the very first has more."""
    groups, records = [pending[0]], len(pending[0].refused)
    for group in list(pending)[1:]:
        records += len(group.refused)
        if records > at_most:
            break
        groups.append(group)
    return groups
