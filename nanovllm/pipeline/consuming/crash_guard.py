"""The crash guard: a job that ends its worker's process again and again becomes a dead letter.

Before the engine starts a job, its offset stands in a compacted topic, one record for each input partition (not on
local disk: the next owner is on another machine). The record outlives its worker. The partition's next owner suspects
all jobs in it, and runs them alone. A crash counts against a job only where it was alone in the engine; a job that
reaches the limit is a dead letter.

What ends the process while a record is decoded stands in no such record. But a partition's record says that it is
owned until its owner leaves alive: after a death, the records that the dead owner may have taken are decoded one by
one, each recorded before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.partitioner import DefaultPartitioner

from nanovllm.errors import BrokersUnavailable, CrashedWorker, EngineDead, NanoVLLMError
from nanovllm.kafka.client import client_kwargs
from nanovllm.kafka.errors import publish_error
from nanovllm.kafka.raw_records import getmany
from nanovllm.kafka.recovering_producer import RecoveringProducer
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.consuming.shared_exclusive_lock import SharedExclusiveLock
from nanovllm.pipeline.consuming.suspect_state import SuspectState
from nanovllm.settings.kafka import KafkaSettings

logger = logging.getLogger(__name__)

READ_BACK = 64
RETRY_S = 0.5
ALONE_TIMEOUT_S = 20.0


class CrashGuard:
    """The in-flight records of a worker's partitions; ``limit`` deaths while alone make a job a dead letter."""

    def __init__(self, topic: str, kafka: KafkaSettings, producer: RecoveringProducer, *, limit: int) -> None:
        self._topic = topic
        self._kafka = kafka
        self._producer = producer
        self._limit = limit
        self._exclusive = SharedExclusiveLock()
        self._records: dict[PartitionLedger, _WrittenRecord] = {}
        self._releasing: set[asyncio.Task[None]] = set()
        self._is_engine_dead = False

    async def take_in(self, tp: TopicPartition, ledger: PartitionLedger) -> None:
        """Read what the partition's last owner left. The record of one that came straight back is written anew.

        Raises:
            BrokersUnavailable: the topic cannot be read.
            TransientError: it could not be written now.
        """
        written = self._records.get(ledger)
        if written is None:
            key = f"{self._kafka.group_id}/{tp.topic}/{tp.partition}".encode()
            record = SuspectState.after(await self._last_value(key), ledger.position)
            taken = ledger.room if record.follows_death else 0
            written = self._records[ledger] = _WrittenRecord(key, record, ledger.position + taken)
        await self._write(written)

    async def part(self, ledgers: Iterable[PartitionLedger]) -> None:
        """Record of partitions that leave a live worker that it did: their next owner suspects none of its jobs."""
        for ledger in ledgers:
            written = self._records.get(ledger)
            if written is not None and written.is_dirty and not self._is_engine_dead:
                async with written.turn:
                    if not written.is_lost:  # the record is the next owner's by now
                        follows_death = ledger.watermark < written.suspected_until
                        await self._send(written.key, written.record.encode_left(follows_death=follows_death))

    def forget(self, ledger: PartitionLedger) -> None:
        """Drop the record of a partition that has left: it belongs to another worker."""
        if written := self._records.pop(ledger, None):
            written.is_lost = True

    @asynccontextmanager
    async def receiving(self, consumed: ConsumedRecord) -> AsyncIterator[None]:
        """Hold what may end the process by being decoded: that it is, is recorded before.

        Raises:
            CrashedWorker: as many workers as are allowed have ended while they decoded it.
        """
        written = self._records.get(consumed.ledger)
        if written is None or consumed.offset >= written.suspected_until:
            yield
            return
        deaths = written.record.deaths_receiving(consumed.offset)
        if deaths >= self._limit:
            raise CrashedWorker(f"{deaths} workers died while they decoded the record")
        async with AsyncExitStack() as stack:
            # A death while a suspect is alone in the engine would be charged to it. The poll waits for this.
            with suppress(TimeoutError):
                async with asyncio.timeout(ALONE_TIMEOUT_S):
                    await stack.enter_async_context(self._exclusive.shared())
            written.record.receive(consumed.offset)
            await self._write_if_possible(written)
            yield
            written.record.end_receive(consumed.offset)
            await self._write_if_possible(written)

    async def _write_if_possible(self, written: _WrittenRecord) -> None:
        try:
            await self._write(written)
        except NanoVLLMError as error:
            logger.warning("what is decoded could not be recorded: %s", error)

    def check(self, consumed: ConsumedRecord) -> int | None:
        """How many workers have ended with the job alone in their engine; None: it is no suspect.

        Raises:
            CrashedWorker: as many as are allowed.
        """
        written = self._records.get(consumed.ledger)
        deaths = None if written is None else written.record.deaths_of(consumed.offset)
        if deaths is not None and deaths >= self._limit:
            raise CrashedWorker(f"{deaths} workers died while the job was alone in their engine")
        return deaths

    def clear(self, consumed: ConsumedRecord) -> None:
        """A job of several parts has ended by itself: it is no suspect any more."""
        written = self._records.get(consumed.ledger)
        if written is not None and not self._is_engine_dead:
            written.record.clear(consumed.offset)

    @asynccontextmanager
    async def enter(self, consumed: ConsumedRecord, *, is_whole: bool = True) -> AsyncIterator[None]:
        """Hold the engine, exclusively for a suspect. ``recorded`` comes before the job may start.

        A part of a job (``is_whole`` False) that ends by itself clears no suspect: another part may be at fault.

        Raises:
            CrashedWorker: as ``check``.
        """
        written = self._records.get(consumed.ledger)
        if written is None:
            yield
            return
        deaths = self.check(consumed)
        if deaths is None:
            async with self._exclusive.shared(), self._noted(written, consumed, is_whole=is_whole):
                yield
            return
        logger.warning(
            "%s-%d: offset %d runs alone: a worker died with it",
            *(consumed.topic, consumed.partition, consumed.offset),
        )
        await self._exclusive.acquire_exclusive()
        try:
            async with self._noted(written, consumed, is_whole=is_whole):
                yield
        finally:
            # The topic must have its end before another suspect starts: the next crash is not its own.
            releasing = asyncio.create_task(self._release(written))
            self._releasing.add(releasing)
            releasing.add_done_callback(self._releasing.discard)

    @asynccontextmanager
    async def _noted(self, written: _WrittenRecord, consumed: ConsumedRecord, *, is_whole: bool) -> AsyncIterator[None]:
        written.record.start(consumed.offset)
        is_cleared = is_whole
        try:
            yield
        except BaseException as error:
            is_cleared = is_whole and isinstance(error, Exception)  # one that was cancelled may still be at fault
            # What is recorded when the engine dies stays.
            self._is_engine_dead |= isinstance(error, EngineDead)
            raise
        finally:
            if not self._is_engine_dead:
                written.record.leave(consumed.offset, is_cleared=is_cleared)

    async def _release(self, written: _WrittenRecord) -> None:
        try:
            while True:
                try:
                    await self._write(written)
                    return
                except NanoVLLMError as error:
                    logger.warning("the end of a suspect could not be recorded: %s", error)
                    await asyncio.sleep(RETRY_S)
        finally:
            self._exclusive.release_exclusive()

    async def recorded(self, consumed: ConsumedRecord) -> None:
        """Return when the topic has what ``enter`` noted. One write carries all that wait for one.

        Raises:
            TransientError: it could not be written now.
            BrokersUnavailable: it is refused.
        """
        written = self._records.get(consumed.ledger)
        if written is not None:
            await self._write(written)

    async def _write(self, written: _WrittenRecord) -> None:
        written.wanted += 1
        mine = written.wanted
        async with written.turn:
            if written.done >= mine or written.is_lost or self._is_engine_dead:
                return
            upto = written.wanted
            written.is_dirty = True
            await self._send(written.key, written.record.encode())
            written.done = upto

    async def _send(self, key: bytes, value: bytes) -> None:
        try:
            await self._producer.send_and_wait(self._topic, value, key=key)
        except KafkaError as error:
            raise publish_error(error, self._topic) from error

    async def _last_value(self, key: bytes) -> bytes | None:
        """The last record of ``key``, sought from the end backwards: it is among the last unless others write more."""
        consumer = AIOKafkaConsumer(**client_kwargs(self._kafka), enable_auto_commit=False)
        try:
            # A topic that is deleted while it is read has no such end any more. The poll waits for this.
            async with asyncio.timeout(2 * self._kafka.request_timeout_ms / 1000):
                await consumer.start()
                await consumer._client._wait_on_metadata(self._topic)  # a consumer without subscription knows no topic
                numbers = sorted(consumer.partitions_for_topic(self._topic) or ())
                tp = TopicPartition(self._topic, DefaultPartitioner()(key, numbers, numbers))
                consumer.assign([tp])
                return await _last_in(consumer, tp, key)
        except (KafkaError, TimeoutError) as error:
            raise BrokersUnavailable(f"topic {self._topic} cannot be read ({type(error).__name__})") from error
        finally:
            await consumer.stop()


@dataclass
class _WrittenRecord:
    """A partition's record, and how much of it the topic has.

    ``suspected_until``: records below may have ended the last owner while it decoded them.
    """

    key: bytes
    record: SuspectState
    suspected_until: int
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    wanted: int = 0
    done: int = 0
    is_dirty: bool = False
    is_lost: bool = False


async def _last_in(consumer: AIOKafkaConsumer, tp: TopicPartition, key: bytes) -> bytes | None:
    beginning = (await consumer.beginning_offsets([tp]))[tp]
    start = end = (await consumer.end_offsets([tp]))[tp]
    length, value = READ_BACK, None
    while value is None and start > beginning:
        start = max(beginning, end - length)
        consumer.seek(tp, start)
        value = await _last_between(consumer, tp, end, key)
        length *= 8
    return value


async def _last_between(consumer: AIOKafkaConsumer, tp: TopicPartition, end: int, key: bytes) -> bytes | None:
    value: bytes | None = None
    while await consumer.position(tp) < end:
        for record in (await getmany(consumer, tp, timeout_ms=500)).get(tp, ()):
            if record.key == key:
                value = record.value
    return value
