"""Retries in place: repeating what may succeed later, while the job waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from copy import copy
from datetime import UTC, datetime
from typing import Any, TypeVar

from nanovllm.errors import NanoVLLMError, SystemicError, TransientError
from nanovllm.metrics import Metrics
from nanovllm.pipeline.failure.backoff import Backoff
from nanovllm.pipeline.failure.faults import ActiveFaults
from nanovllm.pipeline.stages.context import Progress

T = TypeVar("T")


class Retry:
    """Repeats attempts with backoff; what concerns every job is reported as a fault of its part."""

    def __init__(self, faults: ActiveFaults, backoff: Backoff, metrics: Metrics) -> None:
        self._faults = faults
        self._backoff = backoff
        self._metrics = metrics

    async def __call__(
        self, attempt: Callable[[], Awaitable[T]], part: str, progress: Progress, *, max_attempts: int | None = None
    ) -> T:
        """What ``attempt`` returns once it succeeds.

        ``max_attempts`` bounds failures of the job alone. Without it, and under a systemic failure, attempts go on
        without end, and the worker takes no work until one succeeds.
        """
        failures = 0
        while True:
            try:
                value = await attempt()
            except (TransientError, SystemicError) as error:
                failures += 1
                progress.attempts = failures
                progress.first_failed_at = progress.first_failed_at or datetime.now(UTC)
                if isinstance(error, SystemicError) or max_attempts is None:
                    self._faults.report(part, error)
                elif failures >= max_attempts:
                    raise
                self._metrics.retries.labels(progress.current_stage).inc()
                asked_s = error.retry_after_s if isinstance(error, TransientError) else 0.0
                await asyncio.sleep(max(self._backoff.wait_s(failures), asked_s))
            else:
                self._faults.clear(part)
                return value


async def gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What they return, in order; the first failure cancels the others and is raised in an ExceptionGroup.

    A NanoVLLMError in it has a ``position`` where there were several.
    """
    if not (waiting := list(coroutines)):
        return []
    caller = asyncio.current_task()
    assert caller is not None
    cancelling = caller.cancelling()
    tasks: list[asyncio.Task[T]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in waiting]
    except ExceptionGroup as failures:
        # In CPython 3.11 the group's own request to cancel its caller stays: a timeout around it that expires later
        # would take itself for a cancel from outside.
        if caller.cancelling() > cancelling:
            caller.uncancel()
        if len(tasks) == 1:
            raise
        raise failures.derive([_with_position(error, tasks) for error in failures.exceptions]) from None
    return [task.result() for task in tasks]


def _with_position(error: Exception, tasks: Sequence[asyncio.Task[Any]]) -> Exception:
    if not isinstance(error, NanoVLLMError):
        return error
    # A copy: several jobs that wait for one read get one error, each at a position of its own.
    own = copy(error)
    own.__cause__ = error
    failed = [None if task.cancelled() else task.exception() for task in tasks]
    own.position = failed.index(error) + 1
    return own
