"""Ticks: a function that is called again and again beside other work of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def tick(on_tick: Callable[[], object], every_s: float) -> None:
    """Call ``on_tick`` now, and every ``every_s`` seconds until the task is cancelled."""
    while True:
        on_tick()
        await asyncio.sleep(every_s)
