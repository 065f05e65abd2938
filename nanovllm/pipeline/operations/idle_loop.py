"""Waiting for an idle event loop, so that work of low priority delays no job, and is never starved."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

IDLE_ITERATIONS = 4
"""Iterations of the loop without other work: a job's next step comes some iterations after the answer it waits for."""

BUSY_ITERATION_S = 60e-6
"""An iteration that takes longer had other work in it; an idle one takes a third."""

MAX_WAIT_S = 0.003


async def idle_loop(clock: Callable[[], float] = time.perf_counter) -> None:
    """Return when the event loop has been idle for ``IDLE_ITERATIONS``, or after ``MAX_WAIT_S``."""
    last = clock()
    end = last + MAX_WAIT_S
    idle = 0
    while idle < IDLE_ITERATIONS and last < end:
        await asyncio.sleep(0)
        now = clock()
        idle = idle + 1 if now - last < BUSY_ITERATION_S else 0
        last = now
