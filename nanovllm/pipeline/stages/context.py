"""One delivery's way through the worker: where it is, how long each stage took, and why it failed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Literal

from nanovllm.engine.outputs import RequestOutput
from nanovllm.errors import DeadlineExceeded, ErrorClass, NanoVLLMError
from nanovllm.messages.base import Reused
from nanovllm.messages.dead_letter import DeadLetterClass, Stage
from nanovllm.messages.encoding import MessageFormat
from nanovllm.messages.result import Result
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.consuming.retry_topics import Origin

_CLASSES: dict[ErrorClass, DeadLetterClass] = {
    ErrorClass.INVALID: "invalid",
    ErrorClass.PERMANENT: "permanent",
    ErrorClass.TRANSIENT: "retries_exhausted",
    ErrorClass.EXPIRED: "expired",
}


def dead_letter_class(error: NanoVLLMError | type[NanoVLLMError]) -> DeadLetterClass:
    """The class of ``error`` as dead letters name it."""
    return _CLASSES[error.error_class]


class JobContext:
    """What is known of a delivery while it is at work. Mutable, and owned by its one task.

    ``job_id`` and ``format`` are unset until the record could be read so far; ``seconds`` are by stage.
    ``attempts`` are those of this delivery; ``waits_in`` is the retry topic in which it ended. ``began`` is the
    monotonic time of its receipt; None: now.
    """

    def __init__(self, delivery: ConsumedRecord, origin: Origin, began: float | None = None) -> None:
        self.delivery = delivery
        self.origin = origin
        self.received_at = datetime.now(UTC)
        self._received = time.monotonic() if began is None else began
        self.job_id: str | None = None
        self.format: MessageFormat = "json"
        self.result_topic: str | None = None
        self.output: RequestOutput | None = None
        self.reused: Reused | None = None
        self.result: Result | None = None
        self.failure: NanoVLLMError | None = None
        self.tenant = ""
        self.expires_at: datetime | None = None
        self.attempts = 1
        self.first_failed_at: datetime | None = origin.first_failed_at
        self.waits_in: str | None = None
        self.current_stage: Stage = "receive"
        self.failed_stage: Stage = "receive"
        self.seconds: dict[Stage, float] = {}

    @property
    def elapsed_s(self) -> float:
        """Seconds since the record was received."""
        return time.monotonic() - self._received

    @property
    def total_attempts(self) -> int:
        """Attempts of this delivery and of those before its delayed retries."""
        return self.origin.attempts + self.attempts

    @property
    def waited_in_kafka_s(self) -> float | None:
        """Seconds between the record's timestamp and its receipt; never negative, since two clocks are compared."""
        if self.delivery.timestamp_ms is None:
            return None
        return max(0.0, self.received_at.timestamp() - self.delivery.timestamp_ms / 1000)

    @property
    def failure_class(self) -> DeadLetterClass:
        """The class of the failure as dead letters name it."""
        return dead_letter_class(self.failure) if self.failure else "permanent"

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Whatever happens inside belongs to the stage ``name``."""
        self.current_stage = name
        started = time.monotonic()
        try:
            yield
        except BaseException:
            self.failed_stage = name
            raise
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    @asynccontextmanager
    async def deadline(self, deadline: datetime | None) -> AsyncIterator[None]:
        """Cancel what happens inside when the job's deadline passes.

        Raises:
            DeadlineExceeded: it has passed, before or while.
        """
        if deadline is None:
            yield
            return
        left_s = (deadline - datetime.now(UTC)).total_seconds()
        if left_s <= 0:
            self.failed_stage = "admit"
            raise DeadlineExceeded(f"the deadline passed {-left_s:.3f} s before the job was received")
        try:
            async with asyncio.timeout(left_s) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineExceeded(f"the deadline passed while the job was in stage {self.failed_stage}") from None

    @property
    def outcome(self) -> Literal["result", "dead_letter", "retry"]:
        """How the delivery ends."""
        if self.failure is None:
            return "result"
        return "dead_letter" if self.waits_in is None else "retry"

    def fail(self, error: NanoVLLMError, *, waits_in: str | None = None) -> None:
        """The delivery ends without an answer because of ``error``; the job may go on waiting in a retry topic."""
        self.failure = error
        self.waits_in = waits_in
        self.output = None
