"""Questions to the object store about documents: their heads and sidecars."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from nanovllm.pipeline.failure.circuit_breaker import CircuitBreaker
from nanovllm.pipeline.stages.context import Progress
from nanovllm.pipeline.stages.fetch import OBJECT_STORE
from nanovllm.pipeline.stages.retry import Retry

T = TypeVar("T")


class AskStore:
    """Asks behind the circuit breaker, ``max_attempts`` times, as objects are fetched: an outage drops no event."""

    def __init__(self, breaker: CircuitBreaker, retry: Retry, *, max_attempts: int) -> None:
        self._breaker = breaker
        self._retry = retry
        self._max_attempts = max_attempts

    async def __call__(self, what: str, ask: Callable[[], Awaitable[T]], progress: Progress) -> T:
        """What ``ask`` returns about the object ``what``. Raises as ``ask``, where it fails for good."""
        return await self._retry(
            lambda: self._breaker.call(what, ask), OBJECT_STORE, progress, max_attempts=self._max_attempts
        )
