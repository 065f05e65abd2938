"""The outcome of a job that failed: a delayed retry, a dead letter, or neither: back to Kafka."""

from __future__ import annotations

import logging

from nanovllm.errors import NanoVLLMError, PoisonLimitReached, SystemicError, TransientError
from nanovllm.pipeline.stages.context import DeadLettered, JobContext, Retried
from nanovllm.pipeline.stages.record_builder import RecordBuilder

logger = logging.getLogger(__name__)


class DeadLetterLimit:
    """At most ``limit`` dead letters without an answer between them (``dead_letters.poison_limit``); None: no limit."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._in_a_row = 0

    def reset(self) -> None:
        """A job was answered."""
        self._in_a_row = 0

    def count(self, wanted: int = 1) -> int:
        """Count dead letters before they are published; returns how many of the ``wanted`` may be.

        Raises:
            PoisonLimitReached: not a single one.
        """
        allowed = wanted if self._limit is None else min(wanted, self._limit - self._in_a_row)
        if allowed <= 0:
            raise PoisonLimitReached(f"{self._in_a_row} jobs in a row became dead letters (dead_letters.poison_limit)")
        self._in_a_row += allowed
        return allowed


class Failure:
    """Decides how a failed job ends."""

    def __init__(self, builder: RecordBuilder, limit: DeadLetterLimit) -> None:
        self._builder = builder
        self._limit = limit

    async def __call__(self, context: JobContext, error: Exception) -> Retried | DeadLettered:
        """A delayed retry where waiting may help and settings and deadline allow it, else a dead letter.

        Raises:
            SystemicError: the job can succeed once the worker is well, or on another worker; or the limit of dead
                letters in a row is reached. Its offset is not committed.
        """
        reason = first_cause(error)
        if isinstance(reason, TransientError):
            try:
                record = await self._builder.delayed_retry(context, reason)
            except Exception as fault:
                return await self.dead_letter(context, fault)
            if record is not None:
                logger.info("job %r waits in %s: %s: %r", context.job_id, record.topic, reason.code, str(reason))
                return Retried((record,), reason)
        return await self.dead_letter(context, reason)

    async def dead_letter(self, context: JobContext, error: Exception) -> DeadLettered:
        """The dead letter of what can never succeed. Raises SystemicError as the call does."""
        reason = dead_letter_reason(error, context)
        self._limit.count()
        stage = context.progress.failed_stage
        record, reason = await self._builder.dead_letter(context, reason)
        of = f" of {context.subject!r}" if context.subject else ""
        logger.warning(
            "job %r%s is a dead letter: %s in stage %s: %r", context.job_id, of, reason.code, stage, str(reason)
        )
        return DeadLettered((record,), reason)


def dead_letter_reason(error: Exception, context: JobContext | None) -> NanoVLLMError:
    """The error that a dead letter names; ``context`` is unset where the record could not be decoded.

    Raises:
        SystemicError: ``error`` is no fault of the job.
    """
    reason = first_cause(error)
    if isinstance(reason, SystemicError):
        raise reason
    if not isinstance(reason, NanoVLLMError):
        job_id, stage = (context.job_id, context.progress.failed_stage) if context else (None, "receive")
        logger.error("job %r failed in stage %s", job_id, stage, exc_info=reason)
        internal = NanoVLLMError(f"internal error of the worker: {type(reason).__name__}")
        internal.__cause__ = reason
        reason = internal
    return reason


def first_cause(error: Exception) -> Exception:
    """The first failure in the groups that a TaskGroup raises; a systemic one before others."""
    if not isinstance(error, ExceptionGroup):
        return error
    causes = [first_cause(cause) for cause in error.exceptions]
    return next((cause for cause in causes if isinstance(cause, SystemicError)), causes[0])
