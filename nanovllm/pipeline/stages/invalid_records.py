"""Invalid records: those of a partition are dead-lettered in batches, and their offsets complete together.

A faulty producer sends thousands of them, with good jobs between and behind them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from nanovllm.errors import MessageTooLarge, NanoVLLMError
from nanovllm.kafka.batch_send import YIELD_EVERY_RECORDS
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.metrics import Metrics
from nanovllm.pipeline.admission.admission import Reservation
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.stages.context import DeadLettered, JobContext, dead_letter_class
from nanovllm.pipeline.stages.failure import DeadLetterLimit
from nanovllm.pipeline.stages.observe import observe_stages
from nanovllm.pipeline.stages.record_builder import RecordBuilder
from nanovllm.pipeline.stages.retry import Retry
from nanovllm.pipeline.stages.trace import job_attributes
from nanovllm.sinks.base import Sink
from nanovllm.sinks.kafka import Unsent

if TYPE_CHECKING:
    from nanovllm.pipeline.operations.tracing import JobTrace

logger = logging.getLogger(__name__)

MAX_BATCH_RECORDS = 128
LOG_LINES_PER_S = 3


@dataclass(frozen=True)
class InvalidRecord:
    """A record that is no job, and why; its ``context`` is unset where nothing of it could be decoded."""

    record: ConsumedRecord
    error: NanoVLLMError
    context: JobContext | None = None

    @property
    def trace(self) -> JobTrace | None:
        """Its trace, where it is sampled."""
        return None if self.context is None else self.context.progress.trace

    def is_like(self, other: InvalidRecord) -> bool:
        """Whether the dead letters of two records of one partition differ in their source alone."""
        mine, others = self.error, other.error
        return (
            self.context is other.context is None
            and (type(mine), mine.args, self.record.headers) == (type(others), others.args, other.record.headers)
            and mine.__cause__ is others.__cause__ is None
        )


@dataclass(eq=False)
class InvalidRecords:
    """The invalid records of each partition, until their dead letters are acknowledged.

    ``context_of``: the context of a record that has none.
    """

    builder: RecordBuilder
    sink: Sink
    metrics: Metrics
    limit: DeadLetterLimit
    retry: Retry
    context_of: Callable[[ConsumedRecord], JobContext]

    def __post_init__(self) -> None:
        self._pending: dict[PartitionLedger, deque[tuple[InvalidRecord, Reservation | None]]] = {}
        self._logged_since = 0.0
        self._logged = 0

    def add(self, ledger: PartitionLedger, received: Sequence[InvalidRecord], reservation: Reservation) -> bool:
        """Add records of a partition; True when it had none, so that ``work_off`` must be started."""
        is_first = ledger not in self._pending
        pending = self._pending.setdefault(ledger, deque())
        pending.extend((one, None) for one in received[:-1])
        pending.append((received[-1], reservation))  # released with the last of them
        return is_first

    def drop(self, ledger: PartitionLedger) -> int:
        """Forget what is left of a partition, and return how many there were: they go back to Kafka."""
        left = self._pending.pop(ledger, ())
        _release(left)
        for one, _ in left:
            if (trace := one.trace) is not None:
                trace.close(is_cut_short=True)
        return len(left)

    async def work_off(self, ledger: PartitionLedger) -> None:
        """Dead-letter the partition's records until none is left. Those of a call that is cancelled stay, for ``drop``.

        Raises:
            PoisonLimitReached: the next one would be one too many; those before it are complete.
        """
        pending, unlogged = self._pending[ledger], 0
        while pending:
            allowed = self.limit.count(min(len(pending), MAX_BATCH_RECORDS))
            batch = [one for one, _ in islice(pending, allowed)]
            await self._dead_letter(batch)
            unlogged += self._log(batch)
            _release([pending.popleft() for _ in batch])
        del self._pending[ledger]
        if unlogged:
            logger.warning("%d more records in a row are dead letters", unlogged)

    async def _dead_letter(self, invalid: Sequence[InvalidRecord]) -> None:
        first = invalid[0].context or self.context_of(invalid[0].record)
        letters, errors = zip(*await self._letters(invalid, first), strict=True)
        transactions, began = first.record.transactions, time.monotonic()
        with first.progress.stage("publish"):
            if transactions is None:
                await self._publish(letters, first)
            else:
                outputs = {one.record.offset: [letter] for one, letter in zip(invalid, letters, strict=True)}
                traces = {one.record.offset: one.trace for one in invalid}
                await self.retry(lambda: transactions.release(outputs, traces), "kafka producer", first.progress)
        for one in invalid:
            one.record.complete()
        self._observe(errors, first, letters[0].topic)
        _end_traces(invalid, errors, began, are_joined=transactions is not None)

    async def _publish(self, letters: Sequence[OutgoingRecord], first: JobContext) -> None:
        unsent = Unsent(self.sink, letters)
        try:
            await self.sink.check(letters)
            await self.retry(unsent, self.sink.part, first.progress)
        except MessageTooLarge:
            if len(letters) == 1:
                raise
            # A topic whose limit the brokers do not tell may take each of them alone.
            for letter in unsent.records:
                await self._publish([letter], first)

    async def _letters(
        self, invalid: Sequence[InvalidRecord], first: JobContext
    ) -> list[tuple[OutgoingRecord, NanoVLLMError]]:
        letters: list[tuple[OutgoingRecord, NanoVLLMError]] = []
        for index, one in enumerate(invalid):
            letter = None
            if index and one.is_like(invalid[index - 1]):
                like, error = letters[-1]
                letter = await self.builder.another_dead_letter(one.record, like)
            if letter is None:
                context = first if index == 0 else one.context or self.context_of(one.record)
                letter, error = await self.builder.dead_letter(context, one.error)
            letters.append((letter, error))
            if index % YIELD_EVERY_RECORDS == YIELD_EVERY_RECORDS - 1:
                await asyncio.sleep(0)
        return letters

    def _observe(self, errors: Sequence[NanoVLLMError], first: JobContext, topic: str) -> None:
        metrics = self.metrics
        metrics.sent.labels(topic).inc(len(errors))
        metrics.jobs.labels("dead_letter").inc(len(errors))
        kinds: Counter[type[NanoVLLMError]] = Counter(type(error) for error in errors)
        for kind, count in kinds.items():
            metrics.dead_letters.labels(dead_letter_class(kind), kind.code, "receive").inc(count)
        # One observation for the batch: its records have the same times.
        observe_stages(metrics, first)

    def _log(self, invalid: Sequence[InvalidRecord]) -> int:
        """Log a few each second; returns how many were not logged."""
        if (now := time.monotonic()) - self._logged_since >= 1.0:
            self._logged_since, self._logged = now, 0
        named = invalid[: max(0, LOG_LINES_PER_S - self._logged)]
        self._logged += len(named)
        for one in named:
            record, error = one.record, one.error
            position = (record.topic, record.partition, record.offset)
            logger.warning("%s:%d:%d is a dead letter: %s in stage receive: %r", *position, error.code, str(error))
        return len(invalid) - len(named)


def _release(ended: Iterable[tuple[InvalidRecord, Reservation | None]]) -> None:
    for _, reservation in ended:
        if reservation is not None:
            reservation.release()


def _end_traces(
    invalid: Sequence[InvalidRecord], errors: Sequence[NanoVLLMError], began: float, *, are_joined: bool
) -> None:
    """End the traces of records whose dead letters were published together; ``are_joined``: by their transaction."""
    ended = time.monotonic()
    traces = [trace for one in invalid if (trace := one.trace) is not None]
    if traces and not are_joined:
        traces[0].join(traces[1:])
    for one, error in zip(invalid, errors, strict=True):
        if (trace := one.trace) is not None and one.context is not None:
            if one is not invalid[0]:  # whose stage is timed
                trace.add_stage("publish", began, ended)
            trace.end(DeadLettered.label, job_attributes(one.context), failure=("receive", error.code))
