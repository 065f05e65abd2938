"""``delivery: exactly_once``: what a partition's jobs send, and the offset behind them, in one transaction.

aiokafka's offset commit inside a transaction carries no member or generation, so that a member which has lost its
partition could still commit for it. What shuts it out is the producer: each input partition has a transactional id of
its own, and the next owner starts a producer with that id, which fences the one before. Only then is
the committed offset read, and only then are records taken.

Outputs are released in offset order. A transaction carries the outputs of a contiguous run of jobs and the offset
behind them; an output above an unfinished job waits. Published at once it would be published again after a crash, for
its offset cannot be committed before the one below it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiokafka import AIOKafkaProducer, OffsetAndMetadata, TopicPartition
from aiokafka.errors import (
    IllegalOperation,
    InvalidProducerEpoch,
    KafkaError,
    MessageSizeTooLargeError,
    ProducerFenced,
)

from nanovllm.errors import MessageTooLarge, NanoVLLMError, TransientError
from nanovllm.kafka.client import transactional_kwargs
from nanovllm.kafka.errors import is_fatal, publish_error
from nanovllm.kafka.keyed_producer import KeyedProducer
from nanovllm.kafka.paced_metadata import pace_metadata
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.kafka.topic_limits import TopicLimits
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.settings.kafka import KafkaSettings

if TYPE_CHECKING:
    from nanovllm.pipeline.operations.tracing import JobTrace

logger = logging.getLogger(__name__)

MAX_JOBS = 500
CLOSE_TIMEOUT_S = 5.0

# A state of its own that aiokafka does not expect ends in an AssertionError.
_FAILURES = (KafkaError, IllegalOperation, AssertionError)

ReadCommitted = Callable[[TopicPartition], Awaitable[int | None]]


@dataclass(frozen=True)
class _Output:
    records: Sequence[OutgoingRecord]
    released: asyncio.Future[None]
    trace: JobTrace | None


class PartitionTransactions:
    """The transactions of one input partition, for as long as it is assigned.

    ``read_committed`` asks the group for the committed offset. ``limits``: of the topics that it writes.
    """

    def __init__(
        self,
        tp: TopicPartition,
        kafka: KafkaSettings,
        read_committed: ReadCommitted,
        limits: TopicLimits | None = None,
    ) -> None:
        self._tp = tp
        self._kafka = kafka
        self._read_committed = read_committed
        self._limits = limits or TopicLimits()
        self._producer: AIOKafkaProducer | None = None
        self._ledger: PartitionLedger | None = None
        self._outputs: dict[int, _Output] = {}
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        self._releasing: asyncio.Task[None] | None = None
        self._max_jobs = self._jobs_bound = MAX_JOBS
        self.committed: int | None = None
        self.is_fenced = False
        self._is_closed = False

    async def open(self) -> bool:
        """Fence the partition's previous owner, then read the committed offset.

        Returns whether that is what it was when this object last knew: no other owner has committed since.

        Raises:
            KafkaError: the brokers refuse.
        """
        async with self._turn:
            before, was_fenced = self.committed, self.is_fenced
            await self._renew()
            return self.committed == before and not was_fenced

    def follow(self, ledger: PartitionLedger) -> None:
        """Release outputs in the order of ``ledger`` from now on; what waits for another one is never released."""
        if self._ledger is not ledger:
            self._outputs = {}
        self._ledger = ledger
        self._changed.set()
        if self._releasing is None:
            self._releasing = asyncio.create_task(self._release_runs(), name=f"transactions of {self._tp}")

    async def release(
        self, outputs: Mapping[int, Sequence[OutgoingRecord]], traces: Mapping[int, JobTrace | None] | None = None
    ) -> None:
        """Return when the transactions with the records of each offset are committed. Settled offsets are left alone.

        The ``traces`` of a transaction's offsets are joined.

        Never returns once the partition is fenced: the jobs are the next owner's, and their tasks are to be cancelled.

        Raises:
            NanoVLLMError: a transaction was given up, and nothing of it is visible.
        """
        loop, ledger = asyncio.get_running_loop(), self._ledger
        waiting = {
            offset: _Output(records, loop.create_future(), (traces or {}).get(offset))
            for offset, records in outputs.items()
            if ledger is None or ledger.is_open(offset)
        }
        self._outputs |= waiting
        self._changed.set()
        try:
            outcomes = await asyncio.gather(*(output.released for output in waiting.values()), return_exceptions=True)
        finally:
            for offset, output in waiting.items():
                if self._outputs.get(offset) is output:
                    del self._outputs[offset]
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def commit_position(self, ledger: PartitionLedger) -> None:
        """Commit the watermark of an idle partition: offsets without a record must not stay as lag.

        Raises:
            KafkaError: it was not committed.
        """
        async with self._turn:
            if self._ledger is ledger and not self.is_fenced and ledger.in_flight == 0:
                await self._transact([], ledger.watermark)

    async def close(self) -> None:
        """Stop, after the transaction that is under way."""
        self._is_closed = True
        if self._releasing is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S), self._turn:
                    self._releasing.cancel()
            self._releasing.cancel()
            await asyncio.gather(self._releasing, return_exceptions=True)
        await _stop(self._producer)
        self._producer = None

    async def _release_runs(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            async with self._turn:
                while not self.is_fenced and self._ledger is not None:
                    offsets, behind = self._ledger.leading(self._outputs, self._max_jobs)
                    if not offsets:
                        break
                    await self._release(self._ledger, offsets, behind)

    async def _release(self, ledger: PartitionLedger, offsets: list[int], behind: int) -> None:
        outputs = [self._outputs.pop(offset) for offset in offsets]
        try:
            await self._transact([record for output in outputs for record in output.records], behind)
        except NanoVLLMError as error:
            if isinstance(error, MessageTooLarge) and len(outputs) > 1:
                # A topic's limit is one for whole batches, and may have been lowered.
                self._jobs_bound = len(outputs) // 2
                error = TransientError(f"records of several jobs were refused together: {error}")
            # One by one for a while: what is refused for one job's sake must not be held against the others.
            self._max_jobs = 1
            if not self.is_fenced:
                for output in outputs:
                    if not output.released.done():
                        output.released.set_exception(error)
            return
        self._max_jobs = min(self._jobs_bound, 2 * self._max_jobs)
        if traces := [output.trace for output in outputs if output.trace is not None]:
            traces[0].join(traces[1:])
        for offset, output in zip(offsets, outputs, strict=True):
            ledger.complete(offset)
            if not output.released.done():
                output.released.set_result(None)

    async def _transact(self, records: list[OutgoingRecord], behind: int) -> None:
        """One transaction, whole or not at all.

        Raises:
            NanoVLLMError: not at all.
        """
        try:
            # aiokafka waits without end for an output partition that is gone; the broker aborts the transaction then.
            async with asyncio.timeout(self._kafka.transaction_timeout_ms / 1000):
                await self._send(records, behind)
        except TimeoutError as error:
            topics = ", ".join(sorted({record.topic for record in records})) or "the group's offsets"
            logger.warning("a transaction of %s was not taken in time; it writes %s", self._tp, topics)
            await self._clean_up(error, behind)
        except (ProducerFenced, InvalidProducerEpoch) as error:
            self._fence()
            raise TransientError(f"{self._tp} belongs to another worker") from error
        except MessageSizeTooLargeError as error:
            await self._clean_up(error, behind, await self._too_large(records))
        except _FAILURES as error:
            logger.warning("a transaction of %s failed: %s", self._tp, type(error).__name__)
            await self._clean_up(error, behind)

    async def _too_large(self, records: list[OutgoingRecord]) -> MessageTooLarge:
        """What a refusal for size means; the limits are read anew, for they were others when the records were made."""
        await self._limits.read_anew()
        largest: dict[str, int] = {}
        for record in records:
            largest[record.topic] = max(record.size_bytes, largest.get(record.topic, 0))
        topics = ", ".join(
            f"{topic} ({size} bytes, limit {self._limits.record_bytes(topic)})"
            for topic, size in sorted(largest.items())
        )
        logger.warning("a transaction of %s was refused for its size; its largest records: %s", self._tp, topics)
        return MessageTooLarge(f"a transaction was refused for its size; its largest records: {topics}")

    async def _send(self, records: list[OutgoingRecord], behind: int) -> None:
        producer = self._producer
        if producer is None:
            raise ProducerFenced()
        await producer.begin_transaction()
        sent = [
            await producer.send(record.topic, record.value, key=record.key, headers=list(record.headers))
            for record in records
        ]
        for outcome in await asyncio.gather(*sent, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        await producer.send_offsets_to_transaction({self._tp: OffsetAndMetadata(behind, "")}, self._kafka.group_id)
        await producer.commit_transaction()
        self.committed = behind

    async def _clean_up(self, error: Exception, behind: int, meaning: NanoVLLMError | None = None) -> None:
        """After a failure: returns when the transaction turns out to be committed; raises when none of it is there."""
        if meaning is None and isinstance(error, KafkaError):
            meaning = publish_error(error, "of a transaction")
        failure = meaning or TransientError(f"a transaction of {self._tp} failed ({type(error).__name__})")
        before = self.committed
        # What is not taken in time is not aborted in time either. After a refusal the producer's numbers are ahead of
        # the broker's: another producer has to begin anew.
        is_broken = isinstance(error, KafkaError) and (is_fatal(error) or isinstance(error, MessageSizeTooLargeError))
        if isinstance(error, TimeoutError) or is_broken or not await self._abort():
            # Whether it was committed is not known. A new producer ends it either way, and then the offset tells.
            try:
                await self._renew()
            except KafkaError:
                self._fence()
                raise failure from error
            if self.committed == behind:
                return
            if self.committed != before:
                self._fence()  # another owner
        raise failure from error

    async def _abort(self) -> bool:
        """Abort the transaction; returns whether it is certain that nothing of it is there."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                if self._producer is not None:
                    await self._producer.abort_transaction()
        except (*_FAILURES, TimeoutError):
            return False
        return True

    def _fence(self) -> None:
        self.is_fenced = True
        logger.warning("%s was fenced: another worker has it; what is at work for it is dropped", self._tp)

    async def _renew(self) -> None:
        await _stop(self._producer)
        self._producer = None
        if self._is_closed:
            raise ProducerFenced()  # a new producer would fence the partition's next owner
        producer = KeyedProducer(**transactional_kwargs(self._kafka, self._tp.topic, self._tp.partition))
        pace_metadata(producer.client)
        try:
            await producer.start()
            if self._is_closed:  # meanwhile: a close that timed out has not stopped this producer
                raise ProducerFenced()
        except BaseException:
            await _stop(producer)
            raise
        self._producer = producer
        self.committed = await self._read_committed(self._tp)
        self.is_fenced = False


async def _stop(producer: AIOKafkaProducer | None) -> None:
    if producer is None:
        return
    with suppress(*_FAILURES, TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await producer.stop()
