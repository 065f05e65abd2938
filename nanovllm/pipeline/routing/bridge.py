"""Bridge from a queue to the events topic, at least once.

1. Receive messages; the queue hides them, and a heartbeat keeps them hidden while they are held.
2. Publish each of their events as a record of its own, key bucket/key; a message that holds none is a dead letter.
3. Delete a message once the brokers have acknowledged every record of it.

What ends between two steps leaves the message in the queue, which delivers it again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

from nanovllm.errors import (
    ConfigurationError,
    ErrorClass,
    InvalidEvent,
    MessageTooLarge,
    NanoVLLMError,
    PoisonLimitReached,
)
from nanovllm.kafka.admin import message_limits
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.kafka.recovering_producer import RecoveringProducer
from nanovllm.kafka.topic_limits import TopicLimits
from nanovllm.kafka.topic_presence import require_topics
from nanovllm.messages.base import Source
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.encoding import CONTENT_TYPES
from nanovllm.pipeline.events.envelope import split_events
from nanovllm.pipeline.failure.backoff import Backoff
from nanovllm.pipeline.operations.stop_signals import StopSignals
from nanovllm.pipeline.routing.sqs import QueueMessage
from nanovllm.settings.worker import Settings
from nanovllm.sinks.dead_letter_record import dead_letter_record
from nanovllm.sinks.kafka import KafkaSink, raise_worst

logger = logging.getLogger(__name__)

HEADERS = (("content-type", CONTENT_TYPES["json"].encode()),)
BEATS = 3
"""Heartbeats in one visibility timeout."""


class Queue(Protocol):
    """A queue as ``SqsQueue`` is one."""

    name: str
    visibility_s: int

    async def receive(self) -> list[QueueMessage]:
        """Some messages, or none after a while."""

    async def extend(self, messages: Sequence[QueueMessage]) -> None:
        """Hide them for another ``visibility_s``."""

    async def release(self, messages: Sequence[QueueMessage]) -> None:
        """Show them to other receivers."""

    async def delete(self, messages: Sequence[QueueMessage]) -> list[QueueMessage]:
        """Delete them; returns those that are still there."""


@dataclass
class Moved:
    """What a bridge has done with the messages of its queue so far."""

    messages: int = 0
    events: int = 0
    test_events: int = 0
    dead_letters: int = 0


@dataclass
class _Held:
    """A received message, and its records that the brokers have not acknowledged yet."""

    message: QueueMessage
    records: list[OutgoingRecord]
    events: int = 0
    test_events: int = 0
    is_dead_letter: bool = False


class Bridge:
    """Moves the messages of ``queue`` to ``settings.topics.events`` and ``dead_letters``."""

    def __init__(self, settings: Settings, queue: Queue, sink: KafkaSink, *, backoff: Backoff | None = None) -> None:
        self.moved = Moved()
        self._settings = settings
        self._queue = queue
        self._sink = sink
        self._backoff = backoff or Backoff()
        self._stopping = asyncio.Event()
        self._dead_letters_in_a_row = 0

    def stop(self) -> None:
        """Receive no more; what is held is moved within ``admission.drain_timeout_s``, or given back to the queue."""
        self._stopping.set()

    async def run(self, *, receivers: int = 1, until_empty: bool = False) -> None:
        """Move messages until ``stop``; with ``until_empty`` until the queue gives none any more.

        Raises:
            ConfigurationError: there is no such queue.
            PoisonLimitReached: more dead letters in a row than ``dead_letters.poison_limit``.
            MessageTooLarge: the topic of dead letters does not take a single one.
            NanoVLLMError: with ``until_empty``, whatever SQS refuses.
        """
        loops = [asyncio.create_task(self._move_messages(until_empty)) for _ in range(receivers)]
        end = asyncio.create_task(self._cancel_late(loops))
        try:
            await asyncio.wait(loops, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in (*loops, end):
                task.cancel()
            outcomes = await asyncio.gather(*loops, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _cancel_late(self, loops: Sequence[asyncio.Task[None]]) -> None:
        await self._stopping.wait()
        await asyncio.sleep(self._settings.admission.drain_timeout_s)
        logger.warning("the brokers did not take what is held in time: its messages go back to the queue")
        for task in loops:
            task.cancel()

    async def _move_messages(self, until_empty: bool) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                messages = await self._queue.receive()
            except NanoVLLMError as error:
                if until_empty or isinstance(error, ConfigurationError):
                    raise
                failures += 1
                logger.warning("%s: tried again", error.in_one_line)
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._backoff.wait_s(failures)):
                        await self._stopping.wait()
                continue
            failures = 0
            if messages:
                await self._move(messages)
            elif until_empty:
                return

    async def _move(self, messages: Sequence[QueueMessage]) -> None:
        left = [_Held(message, []) for message in messages]
        async with self._hidden(left):
            for one in left:
                await self._read(one)
            failures = 0
            while left:
                errors = [
                    error
                    for step in (self._publish, self._delete_acknowledged)
                    if (error := await _transient_error(step(left))) is not None
                ]
                if left:
                    failures += 1
                    logger.warning("%s: tried again", errors[0].in_one_line if errors else "SQS still has a message")
                    await asyncio.sleep(self._backoff.wait_s(failures))

    @asynccontextmanager
    async def _hidden(self, left: list[_Held]) -> AsyncIterator[None]:
        """Keep the messages of ``left`` hidden from other receivers; those that are left at the end are released."""
        is_over = asyncio.Event()
        heartbeat = asyncio.create_task(self._extend(left, is_over))
        try:
            yield
        finally:
            is_over.set()
            await heartbeat  # one that comes after the release would hide them again
            if left:
                with suppress(NanoVLLMError):
                    await self._queue.release([one.message for one in left])

    async def _extend(self, left: list[_Held], is_over: asyncio.Event) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._queue.visibility_s / BEATS):
                    await is_over.wait()
                    return
            try:
                await self._queue.extend([one.message for one in left])
            except NanoVLLMError as error:
                logger.warning("%s: messages may be delivered twice", error.in_one_line)

    async def _read(self, held: _Held) -> None:
        """Make the records of a message: its events, or its dead letter."""
        try:
            events = split_events(held.message.body)
            records = [
                OutgoingRecord(self._settings.topics.events, f"{event.bucket}/{event.key}".encode(), alone, HEADERS)
                for event, alone in events
                if event.kind != "test"
            ]
            await self._sink.check(records)
        except (InvalidEvent, MessageTooLarge) as error:
            await self._make_dead_letter(held, error)
        else:
            held.records, held.events, held.test_events = records, len(records), len(events) - len(records)
            self._dead_letters_in_a_row = 0

    async def _publish(self, left: Sequence[_Held]) -> None:
        """Publish every record of ``left``, and take those off that the brokers acknowledge."""
        topics, errors = self._settings.topics, []
        # Dead letters last: an event that its topic refuses becomes one.
        for topic in (topics.events, topics.dead_letters):
            sent = [(one, record) for one in left for record in one.records if record.topic == topic]
            outcomes = await self._sink.publish_each([record for _, record in sent]) if sent else []
            for (one, record), error in zip(sent, outcomes, strict=True):
                if error is None:
                    one.records = [other for other in one.records if other is not record]
                elif not isinstance(error, MessageTooLarge):
                    errors.append(error)
                elif topic == topics.dead_letters:
                    raise error
                elif not one.is_dead_letter:
                    await self._make_dead_letter(one, error)
        raise_worst(errors)

    async def _delete_acknowledged(self, left: list[_Held]) -> None:
        done = [one for one in left if not one.records]
        kept = await self._queue.delete([one.message for one in done]) if done else []
        for one in done:
            if one.message not in kept:
                left.remove(one)
                self.moved.messages += 1
                self.moved.events += one.events
                self.moved.test_events += one.test_events
                self.moved.dead_letters += one.is_dead_letter

    async def _make_dead_letter(self, held: _Held, error: InvalidEvent | MessageTooLarge) -> None:
        limit = self._settings.dead_letters.poison_limit
        if limit is not None and self._dead_letters_in_a_row >= limit:
            raise PoisonLimitReached(
                f"{self._dead_letters_in_a_row} messages of queue {self._queue.name} in a row became dead letters "
                "(dead_letters.poison_limit)"
            )
        self._dead_letters_in_a_row += 1
        message, topics, now = held.message, self._settings.topics, datetime.now(UTC)
        # `dlq replay` tells records apart by their source. One message has one number, however often it is delivered.
        number = int.from_bytes(hashlib.sha256(message.message_id.encode()).digest()[:6], "big")
        letter = DeadLetter(
            code=error.code,
            error_class="invalid" if error.error_class is ErrorClass.INVALID else "permanent",
            stage="receive",
            message=str(error),
            retryable=error.retryable,
            attempts=message.receive_count,
            source=Source(topic=topics.events, partition=0, offset=number, timestamp_ms=message.sent_at_ms),
            queue=self._queue.name,
            message_id=message.message_id,
            worker=self._settings.worker_id,
            received_at=now,
            failed_at=now,
        )
        max_bytes = await self._sink.max_record_bytes(topics.dead_letters, len(message.body))
        record = dead_letter_record(
            letter,
            topics.dead_letters,
            key=None,
            value=message.body,
            original_headers=HEADERS,
            max_bytes=max_bytes,
        )
        held.records, held.events, held.test_events, held.is_dead_letter = [record], 0, 0, True


async def _transient_error(step: Awaitable[None]) -> NanoVLLMError | None:
    """The error of ``step`` that may pass: the brokers' or the queue's. Raises every other."""
    try:
        await step
    except (ConfigurationError, MessageTooLarge, PoisonLimitReached):
        raise
    except NanoVLLMError as error:
        return error
    return None


async def run_bridge(
    settings: Settings, queue: Queue, signals: StopSignals, *, receivers: int, until_empty: bool
) -> Moved:
    """Move the messages of ``queue`` until a signal comes; returns what was moved.

    Raises:
        MissingTopic, ConfigurationError, BrokersUnavailable: before anything is received.
        NanoVLLMError: as ``Bridge.run`` says.
    """
    kafka, topics = settings.kafka, (settings.topics.events, settings.topics.dead_letters)
    await require_topics(kafka, topics)
    read_limits = partial(message_limits, kafka, topics)
    limits = TopicLimits(await read_limits(), read=read_limits)
    producer = RecoveringProducer.within(kafka, limits)
    await producer.start()
    try:
        bridge = Bridge(settings, queue, KafkaSink(producer, limits))
        # A call that waits for messages ends by itself: what it would bring is hidden otherwise.
        signals.hand_to(bridge.stop, has_taken=lambda: True)
        logger.info("queue %s goes to topic %s", queue.name, settings.topics.events)
        await bridge.run(receivers=receivers, until_empty=until_empty)
        return bridge.moved
    finally:
        await producer.stop()
