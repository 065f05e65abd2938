"""Event loop that lets the engine's thread have the interpreter's lock between two rounds of callbacks."""

from __future__ import annotations

import asyncio
import selectors
import sys
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

YIELD_S = 2e-5
"""Long enough for another thread to wake; the system makes it about 75 µs."""
MAX_RUN_S = 1e-4
"""Of callbacks between two pauses, about; what `idle_loop` takes for idle stays below."""


class YieldingSelector(selectors.DefaultSelector):
    """Selector that sleeps a moment where it would not wait, unless the loop has just begun to run callbacks.

    A loop with callbacks to run polls without waiting. That gives the lock away for less time than a thread takes to
    wake, so that the loop has it again, and the other thread's time until it may demand the lock begins anew: beside a
    loop that is never idle it hardly ever gets it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._paused = time.perf_counter()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As the system's selector."""
        if timeout is None or timeout > 0:
            ready = super().select(timeout)
        elif time.perf_counter() - self._paused < MAX_RUN_S:
            return super().select(timeout)
        else:
            time.sleep(YIELD_S)
            ready = super().select(timeout)
        self._paused = time.perf_counter()
        return ready


def run(main: Coroutine[Any, Any, T], *, beside_engine: bool) -> T:
    """As ``asyncio.run``; ``beside_engine``: with a loop that yields to the thread of an engine, where loops select."""
    yields = beside_engine and sys.platform != "win32"
    factory = (lambda: asyncio.SelectorEventLoop(YieldingSelector())) if yields else None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)
