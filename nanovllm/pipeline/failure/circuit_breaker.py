"""A circuit breaker: while a store fails for all jobs, one job at a time asks it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass
from typing import TypeVar

from nanovllm.errors import ObjectRefused, ObjectUnavailable, SystemicError, TransientError
from nanovllm.pipeline.failure.backoff import Backoff

T = TypeVar("T")


@dataclass(eq=False)
class CircuitBreaker:
    """Closed, every call passes. After ``threshold`` different things failed with no success between, it opens.

    Open, calls wait and count no attempt. When the wait is over one call goes through: its success lets all
    others pass, its failure opens the circuit for twice as long. A call that fails for good is a success: what it
    asked answered. So is one whose object alone is unavailable or refused: one tenant's key or bucket must not stop
    the others.

    ``waits``: how long it stays open; ``opened`` is told so each time, to take no work meanwhile.
    """

    _: KW_ONLY
    threshold: int
    waits: Backoff
    opened: Callable[[TransientError, float], None]
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._failing: set[str] = set()
        self._openings = 0
        self._open_until = 0.0
        self._is_probing = False
        self._closed = asyncio.Event()
        self._closed.set()

    @property
    def is_closed(self) -> bool:
        """Whether calls pass."""
        return self._closed.is_set()

    async def call(self, what: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """What ``attempt`` returns or raises; ``what`` tells failures of the same thing apart from others."""
        is_probe = await self._wait_until_closed()
        try:
            outcome = await attempt()
        except (ObjectRefused, ObjectUnavailable):
            self._close()
            raise
        except TransientError as error:
            self._fail(what, error, is_probe=is_probe)
            raise
        except SystemicError:
            raise  # reported by the caller; no answer of the store
        except Exception:
            self._close()
            raise
        finally:
            if is_probe:
                self._is_probing = False
        self._close()
        return outcome

    async def _wait_until_closed(self) -> bool:
        while not self.is_closed:
            left_s = self._open_until - self.clock()
            if left_s <= 0 and not self._is_probing:
                self._is_probing = True
                return True
            with contextlib.suppress(TimeoutError):
                # Calls that wait for a probe look again soon: the probe may be cancelled.
                async with asyncio.timeout(left_s if left_s > 0 else self.waits.base_s):
                    await self._closed.wait()
        return False

    def _fail(self, what: str, error: TransientError, *, is_probe: bool) -> None:
        self._failing.add(what)
        if is_probe or (self.is_closed and len(self._failing) >= self.threshold):
            self._closed.clear()
            self._openings += 1
            wait_s = self.waits.longest_s(self._openings)
            self._open_until = self.clock() + wait_s
            self.opened(error, wait_s)

    def _close(self) -> None:
        self._failing.clear()
        self._openings = 0
        self._closed.set()
