"""The receive stage: a consumed record becomes a job with its context, or an invalid record."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

from nanovllm.errors import CrashedWorker, InvalidJob
from nanovllm.messages.codec import decode_job, message_format
from nanovllm.messages.job import Job, derive_job_id
from nanovllm.messages.sent_job_id import job_id_in_json
from nanovllm.pipeline.consuming.crash_guard import CrashGuard
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.consuming.retry_topics import RetryTopics
from nanovllm.pipeline.stages.context import JobContext, Progress
from nanovllm.pipeline.stages.failure import dead_letter_reason
from nanovllm.pipeline.stages.invalid_records import InvalidRecord
from nanovllm.settings.worker import Settings

MAX_BYTES_AT_ONCE = 64 << 10
"""Longest message that is decoded in the event loop: a few milliseconds at the worst."""


DecodeJob = Callable[..., Job]
"""As `decode_job`: the bytes, and ``max_bytes`` by its name."""


@dataclass(frozen=True)
class Received:
    """A job, and its context."""

    context: JobContext
    job: Job


class Receive:
    """Decodes records, and resolves what the settings say about each: tenant, expiry, result topic.

    ``decode`` in place of `decode_job` takes other forms of a job too.
    """

    def __init__(self, settings: Settings, retry_topics: RetryTopics, decode: DecodeJob | None = None) -> None:
        self._settings = settings
        self._retry_topics = retry_topics
        self._decode = decode or decode_job

    async def __call__(self, record: ConsumedRecord) -> Received | InvalidRecord:
        """Decode ``record``. Raises SystemicError where that is no fault of the record."""
        settings = self._settings
        began, context = time.monotonic(), None
        try:
            if record.refusal is not None:
                raise record.refusal
            decode = partial(self._decode, record.value, max_bytes=settings.admission.max_job_bytes)
            # In a thread the event loop gets the interpreter back every few milliseconds.
            job = await asyncio.to_thread(decode) if len(record.value) > MAX_BYTES_AT_ONCE else decode()
            context = self.context_of(record, began)
            context = replace(
                context,
                format=message_format(record.value),
                job_id=job.job_id or context.job_id,
                expires_at=self._expiry(job, context),
            )
            tenant = settings.tenants.tenant_of(context.origin.source.topic, context.origin.headers)
            salt, result_topic = settings.tenants.salt_of(tenant), settings.topics.result_topic(job.reply_to)
            context = replace(context, tenant=tenant, salt=salt, result_topic=result_topic)
        except Exception as error:
            reason = dead_letter_reason(error, context)
            if reason is error:
                # Its name and text are published: the frames that it was raised in need not stay until then.
                reason.__traceback__ = reason.__context__ = None
            if context is None and isinstance(reason, InvalidJob) and reason.job_id is not None:
                context = replace(self.context_of(record, began), job_id=reason.job_id)
            return InvalidRecord(record, reason, context)
        if job.job_id is None:
            job = job.model_copy(update={"job_id": context.job_id})
        context.progress.seconds["receive"] = context.progress.elapsed_s
        return Received(context, job)

    def context_of(self, record: ConsumedRecord, began: float | None = None) -> JobContext:
        """The context of a record that is not decoded yet; ``began`` is the monotonic time of its receipt."""
        origin = self._retry_topics.origin_of(record)
        source = origin.source
        job_id = derive_job_id(source.topic, source.partition, source.offset)
        return JobContext(record, origin, job_id, Progress(began or time.monotonic(), origin.first_failed_at))

    def _expiry(self, job: Job, context: JobContext) -> datetime | None:
        """The job's deadline, or the end of ``admission.ttl_s``, if that is earlier."""
        ttl_s, written_ms = self._settings.admission.ttl_s, context.origin.source.timestamp_ms
        if ttl_s is None or written_ms is None:
            return job.deadline
        try:
            end = datetime.fromtimestamp(written_ms / 1000 + ttl_s, UTC)
        except (OverflowError, ValueError, OSError):
            return job.deadline  # beyond the calendar: a producer that writes microseconds
        return end if job.deadline is None else min(end, job.deadline)


class GuardReceive:
    """Records what is decoded before it is, where the partition's last owner died."""

    def __init__(self, receive: Receive, guard: CrashGuard) -> None:
        self._receive = receive
        self._guard = guard

    async def __call__(self, record: ConsumedRecord) -> Received | InvalidRecord:
        """As ``receive``; an invalid record where decoding it has ended as many workers as are allowed."""
        try:
            async with self._guard.receiving(record):
                return await self._receive(record)
        except CrashedWorker as error:
            # Not decoded to learn it: that has ended workers.
            job_id = job_id_in_json(record.value)
            context = replace(self._receive.context_of(record), job_id=job_id) if job_id else None
            return InvalidRecord(record, error, context)
