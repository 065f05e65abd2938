"""Retries in place: repeating what may succeed later, while the job waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from datetime import UTC, datetime
from typing import Any, TypeVar

from nanovllm.errors import SystemicError, TransientError
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
                await asyncio.sleep(self._backoff.wait_s(failures))
            else:
                self._faults.clear(part)
                return value


async def gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What they return, in order; the first failure cancels the others and is raised in an ExceptionGroup."""
    caller = asyncio.current_task()
    assert caller is not None
    cancelling = caller.cancelling()
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except ExceptionGroup:
        # In CPython 3.11 the group's own request to cancel its caller stays: a timeout around it that expires later
        # would take itself for a cancel from outside.
        if caller.cancelling() > cancelling:
            caller.uncancel()
        raise
    return [task.result() for task in tasks]
