"""A job's context: its record, where it came from and how far it has come; and the outcome that ends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, ClassVar, Literal

from nanovllm.engine.outputs import RequestOutput
from nanovllm.errors import DeadlineExceeded, ErrorClass, NanoVLLMError, TransientError
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.messages.base import Reused
from nanovllm.messages.dead_letter import DeadLetterClass, Stage
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.messages.encoding import MessageFormat
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.consuming.retry_topics import Origin
from nanovllm.pipeline.operations.engine_idle import EngineIdle
from nanovllm.value_object import value_object

if TYPE_CHECKING:
    from nanovllm.pipeline.operations.tracing import JobTrace

_CLASSES: dict[ErrorClass, DeadLetterClass] = {
    ErrorClass.INVALID: "invalid",
    ErrorClass.PERMANENT: "permanent",
    ErrorClass.TRANSIENT: "retries_exhausted",
    ErrorClass.EXPIRED: "expired",
}


def dead_letter_class(error: NanoVLLMError | type[NanoVLLMError]) -> DeadLetterClass:
    """The class of ``error`` as dead letters name it."""
    return _CLASSES[error.error_class]


@dataclass(eq=False)
class Progress:
    """How far a job has come; mutable, owned by one task. ``began`` is the monotonic time of the record's receipt.

    ``attempts`` are those of this delivery, ``seconds`` those of each stage; ``trace`` is there where it is sampled.
    """

    began: float
    first_failed_at: datetime | None = None
    received_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    attempts: int = 1
    current_stage: Stage = "receive"
    failed_stage: Stage = "receive"
    seconds: dict[Stage, float] = field(default_factory=dict)
    idle: EngineIdle | None = None
    trace: JobTrace | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the record was received."""
        return time.monotonic() - self.began

    def stage(self, name: Stage) -> _StageTimer:
        """Count the seconds inside for the stage ``name``, and a failure inside as its failure."""
        return _StageTimer(self, name)


class _StageTimer:
    # Not a generator's context manager: a job has eight of these, at a third of the time.
    __slots__ = ("_name", "_progress", "_started")

    def __init__(self, progress: Progress, name: Stage) -> None:
        self._progress = progress
        self._name = name

    def __enter__(self) -> None:
        self._progress.current_stage = self._name
        if (idle := self._progress.idle) is not None:
            idle.enter_stage(self._name)
        self._started = time.monotonic()

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        progress, name = self._progress, self._name
        if (idle := progress.idle) is not None:
            idle.leave_stage(name)
        if error_type is not None:
            progress.failed_stage = name
        ended = time.monotonic()
        progress.seconds[name] = progress.seconds.get(name, 0.0) + ended - self._started
        if (trace := progress.trace) is not None:
            trace.add_stage(name, self._started, ended)


@value_object
class JobContext:
    """What is known of a job beside the job itself; ``salt`` keeps the tenants' caches apart.

    ``subject``: the URI of its document, for logs; ``route``: the name of the route that takes it.
    """

    record: ConsumedRecord
    origin: Origin
    job_id: str
    progress: Progress
    format: MessageFormat = "json"
    tenant: str = ""
    salt: bytes = b""
    expires_at: datetime | None = None
    result_topic: str | None = None
    subject: str | None = None
    route: str = ""

    @property
    def total_attempts(self) -> int:
        """Attempts of this delivery and of those before its delayed retries."""
        return self.origin.attempts + self.progress.attempts

    @property
    def waited_in_kafka_s(self) -> float | None:
        """Seconds between the record's timestamp and its receipt; never negative, since two clocks are compared."""
        if self.record.timestamp_ms is None:
            return None
        return max(0.0, self.progress.received_at.timestamp() - self.record.timestamp_ms / 1000)

    def deadline(self) -> AbstractAsyncContextManager[None]:
        """Cancel what happens inside when the job expires.

        Raises:
            DeadlineExceeded: it has expired, before or inside.
        """
        return nullcontext() if self.expires_at is None else self._until(self.expires_at)

    @asynccontextmanager
    async def _until(self, expires_at: datetime) -> AsyncIterator[None]:
        left_s = (expires_at - datetime.now(UTC)).total_seconds()
        if left_s <= 0:
            self.progress.failed_stage = "admit"
            raise DeadlineExceeded(f"the deadline passed {-left_s:.3f} s before the job was received")
        try:
            async with asyncio.timeout(left_s) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            stage = self.progress.failed_stage
            raise DeadlineExceeded(f"the deadline passed while the job was in stage {stage}") from None


@value_object
class Answered:
    """A job with an answer: the records of its result and its metrics; ``reused`` where another job was inferred."""

    label: ClassVar = "result"

    records: tuple[OutgoingRecord, ...]
    output: RequestOutput
    reused: Reused | None = None


@dataclass(frozen=True)
class Retried:
    """A job that goes to a retry topic, as its one record."""

    label: ClassVar = "retry"

    records: tuple[OutgoingRecord, ...]
    error: TransientError


@dataclass(frozen=True)
class DeadLettered:
    """A job that can never succeed: its one record is the dead letter."""

    label: ClassVar = "dead_letter"

    records: tuple[OutgoingRecord, ...]
    error: NanoVLLMError


SkipReason = Literal[
    "removed", "test", "other", "no_route", "sidecar", "same", "superseded", "missing", "source_changed"
]


@dataclass(frozen=True)
class Extracted:
    """An event whose document has a record: the Kafka records of it and of its metrics."""

    label: ClassVar = "result"

    records: tuple[OutgoingRecord, ...]
    record: DocumentRecord


@dataclass(frozen=True)
class Skipped:
    """An event that leads to no record, and why; nothing is published for it."""

    label: ClassVar = "skipped"
    records: ClassVar[tuple[OutgoingRecord, ...]] = ()

    reason: SkipReason


class EventSkippedError(Exception):
    """Ends the stages of an event that leads to no record."""

    def __init__(self, reason: SkipReason) -> None:
        super().__init__(reason)
        self.reason: SkipReason = reason


Outcome = Answered | Extracted | Retried | DeadLettered | Skipped


@value_object
class Inference:
    """The engine's output for a job, or another job's equal one."""

    output: RequestOutput
    reused: Reused | None = None
