"""A readers–writer lock for one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class SharedExclusiveLock:
    """Held by many as shared, or by one as exclusive. A waiting exclusive holder goes before later shared ones."""

    def __init__(self) -> None:
        self._shared = 0
        self._is_exclusive = False
        self._exclusive_waiting = 0
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Hold the lock as shared; waits for exclusive holders, those that wait among them."""
        await self._until(lambda: not self._is_exclusive and not self._exclusive_waiting)
        self._shared += 1
        try:
            yield
        finally:
            self._shared -= 1
            self._changed.set()

    async def acquire_exclusive(self) -> None:
        """Hold the lock as exclusive until ``release_exclusive``; waits for every holder."""
        self._exclusive_waiting += 1
        try:
            await self._until(lambda: not self._is_exclusive and not self._shared)
            self._is_exclusive = True
        finally:
            self._exclusive_waiting -= 1
            self._changed.set()

    def release_exclusive(self) -> None:
        """Release the exclusive lock."""
        self._is_exclusive = False
        self._changed.set()

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._changed.clear()
            await self._changed.wait()
