"""Work that can wait: it gets the event loop when nobody else wants it, and a little of it in any case."""

from __future__ import annotations

import asyncio
import time

QUIET_TURNS = 4
"""Turns of the loop without other work: a job's next step comes some turns after the answer it waits for."""

BUSY_TURN_S = 60e-6
"""A turn that takes longer had other work in it; an idle one takes a third."""

PATIENCE_S = 0.003
"""Longest wait for quiet turns: work that can wait is slow beside other work, and never stands still."""


async def spare_time() -> None:
    """Return when the event loop has been idle for some turns, or when ``PATIENCE_S`` are over."""
    turn = time.perf_counter()
    end = turn + PATIENCE_S
    quiet = 0
    while quiet < QUIET_TURNS and turn < end:
        await asyncio.sleep(0)
        now = time.perf_counter()
        quiet = quiet + 1 if now - turn < BUSY_TURN_S else 0
        turn = now
