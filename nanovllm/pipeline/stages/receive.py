"""The receive stage: a consumed record becomes a job or events with their context, or an invalid record."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from nanovllm.errors import CrashedWorker, InvalidJob
from nanovllm.messages.codec import decode_job, message_format
from nanovllm.messages.job import Job, derive_job_id
from nanovllm.messages.sent_job_id import job_id_in_json
from nanovllm.pipeline.consuming.crash_guard import CrashGuard
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.consuming.retry_topics import RetryTopics
from nanovllm.pipeline.events.envelope import split_events
from nanovllm.pipeline.events.event import ObjectEvent
from nanovllm.pipeline.operations.engine_idle import EngineIdle
from nanovllm.pipeline.stages.context import JobContext, Progress
from nanovllm.pipeline.stages.failure import dead_letter_reason
from nanovllm.pipeline.stages.invalid_records import InvalidRecord
from nanovllm.settings.worker import Settings
from nanovllm.value_object import changed, value_object

if TYPE_CHECKING:
    from nanovllm.pipeline.operations.tracing import Tracing

MAX_BYTES_AT_ONCE = 64 << 10
"""Longest message that is decoded in the event loop: a few milliseconds at the worst."""


T = TypeVar("T")
DecodeJob = Callable[..., Job]
"""As `decode_job`: the bytes, and ``max_bytes`` by its name."""


@value_object
class Received:
    """A job, and its context."""

    context: JobContext
    job: Job


@value_object
class ReceivedEvents:
    """The events of a record, each with its own notification as a message, and the record's context."""

    context: JobContext
    events: tuple[tuple[ObjectEvent, bytes], ...]


class Receive:
    """Decodes records, and resolves what the settings say about each: tenant, expiry, result topic.

    ``decode`` in place of `decode_job` takes other forms of a job too.
    """

    def __init__(
        self, settings: Settings, retry_topics: RetryTopics, idle: EngineIdle, decode: DecodeJob | None = None
    ) -> None:
        self._settings = settings
        self._idle = idle
        self._retry_topics = retry_topics
        self._decode = decode or decode_job

    async def __call__(self, record: ConsumedRecord) -> Received | InvalidRecord:
        """Decode ``record``. Raises SystemicError where that is no fault of the record."""
        settings = self._settings
        began, context = time.monotonic(), None
        try:
            job = await decoded(record, partial(self._decode, max_bytes=settings.admission.max_job_bytes))
            context = self.context_of(record, began, job)
            context = self.of_tenant(context, settings.topics.result_topic(job.reply_to))
        except Exception as error:
            return self.invalid(record, began, context, error)
        if job.job_id is None:
            job = job.model_copy(update={"job_id": context.job_id})
        context.progress.seconds["receive"] = context.progress.elapsed_s
        return Received(context, job)

    def context_of(self, record: ConsumedRecord, began: float | None = None, job: Job | None = None) -> JobContext:
        """The context of a record, of ``job`` where it is decoded; ``began`` is the monotonic time of its receipt."""
        origin = self._retry_topics.origin_of(record)
        progress = Progress(began or time.monotonic(), origin.first_failed_at, idle=self._idle)
        source = origin.source
        job_id = (job and job.job_id) or derive_job_id(source.topic, source.partition, source.offset)
        if job is None:
            return JobContext(record, origin, job_id, progress)
        expires_at = self._expiry(job, source.timestamp_ms)
        return JobContext(record, origin, job_id, progress, message_format(record.value), expires_at=expires_at)

    def of_tenant(self, context: JobContext, result_topic: str | None = None) -> JobContext:
        """``context`` with the tenant of its record. Raises NanoVLLMError where it has none, and must have one."""
        tenants = self._settings.tenants
        tenant = tenants.tenant_of(context.origin.source.topic, context.origin.headers)
        return changed(context, tenant=tenant, salt=tenants.salt_of(tenant), result_topic=result_topic)

    def invalid(
        self, record: ConsumedRecord, began: float, context: JobContext | None, error: Exception
    ) -> InvalidRecord:
        """``record`` as an invalid one, because of ``error``. Raises SystemicError where that is no fault of it."""
        reason = dead_letter_reason(error, context)
        if reason is error:
            # Its name and text are published: the frames that it was raised in need not stay until then.
            reason.__traceback__ = reason.__context__ = None
        if context is None and isinstance(reason, InvalidJob) and reason.job_id is not None:
            context = replace(self.context_of(record, began), job_id=reason.job_id)
        return InvalidRecord(record, reason, context)

    def _expiry(self, job: Job, written_ms: int | None) -> datetime | None:
        """The job's deadline, or the end of ``admission.ttl_s``, if that is earlier."""
        ttl_s = self._settings.admission.ttl_s
        if ttl_s is None or written_ms is None:
            return job.deadline
        try:
            end = datetime.fromtimestamp(written_ms / 1000 + ttl_s, UTC)
        except (OverflowError, ValueError, OSError):
            return job.deadline  # beyond the calendar: a producer that writes microseconds
        return end if job.deadline is None else min(end, job.deadline)


class ReceiveEvents:
    """Reads the records of the topic of events, and those of its retry topics."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive

    async def __call__(self, record: ConsumedRecord) -> ReceivedEvents | InvalidRecord:
        """The events of ``record``. Raises SystemicError where that is no fault of the record."""
        began, context = time.monotonic(), None
        try:
            events = await decoded(record, split_events)
            context = self._receive.of_tenant(self._receive.context_of(record, began))
        except Exception as error:
            return self._receive.invalid(record, began, context, error)
        context.progress.seconds["receive"] = context.progress.elapsed_s
        return ReceivedEvents(context, tuple(events))


class ReceiveByTopic:
    """Receives the records of ``topics`` as events, and all others as jobs."""

    def __init__(self, receive: Receive, topics: Collection[str]) -> None:
        self._jobs = receive
        self._events = ReceiveEvents(receive)
        self._topics = frozenset(topics)

    async def __call__(self, record: ConsumedRecord) -> Received | ReceivedEvents | InvalidRecord:
        """As `Receive` or `ReceiveEvents`."""
        return await (self._events if record.topic in self._topics else self._jobs)(record)


class GuardReceive:
    """Records what is decoded before it is, where the partition's last owner died."""

    def __init__(
        self,
        receive: Callable[[ConsumedRecord], Awaitable[Received | ReceivedEvents | InvalidRecord]],
        guard: CrashGuard,
        context_of: Callable[[ConsumedRecord], JobContext],
    ) -> None:
        self._receive = receive
        self._guard = guard
        self._context_of = context_of

    async def __call__(self, record: ConsumedRecord) -> Received | ReceivedEvents | InvalidRecord:
        """As ``receive``; an invalid record where decoding it has ended as many workers as are allowed."""
        try:
            async with self._guard.receiving(record):
                return await self._receive(record)
        except CrashedWorker as error:
            # Not decoded to learn it: that has ended workers.
            job_id = job_id_in_json(record.value)
            context = replace(self._context_of(record), job_id=job_id) if job_id else None
            return InvalidRecord(record, error, context)


class TraceReceive:
    """Begins the trace of each record; what is sent for it carries that in place of the headers that came."""

    def __init__(
        self,
        receive: Callable[[ConsumedRecord], Awaitable[Received | ReceivedEvents | InvalidRecord]],
        tracing: Tracing,
        context_of: Callable[[ConsumedRecord], JobContext],
    ) -> None:
        self._receive = receive
        self._tracing = tracing
        self._context_of = context_of

    async def __call__(self, record: ConsumedRecord) -> Received | ReceivedEvents | InvalidRecord:
        """As ``receive``; an invalid record has a context too."""
        trace = self._tracing.begin(record.topic, record.partition, record.offset, record.headers)
        began = time.monotonic()
        received = await self._receive(record)
        context = received.context or self._context_of(record)
        trace.add_stage("receive", began, time.monotonic())
        context.progress.trace = trace if trace.is_recorded else None
        origin = changed(context.origin, headers=trace.carried(context.origin.headers))
        return replace(received, context=changed(context, origin=origin))


async def decoded(record: ConsumedRecord, decode: Callable[[bytes], T]) -> T:
    """What ``decode`` makes of the record's value; in a thread where that takes long.

    Raises:
        InvalidJob: as ``decode``, or why the record's source refuses it.
    """
    if record.refusal is not None:
        raise record.refusal
    # In a thread the event loop gets the interpreter back every few milliseconds.
    in_thread = len(record.value) > MAX_BYTES_AT_ONCE
    return await asyncio.to_thread(decode, record.value) if in_thread else decode(record.value)
