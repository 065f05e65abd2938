"""Among others or alone: a lock that many share or one has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class SharedExclusiveLock:
    """Lets many in together, or one alone. Whoever wants to be alone goes before those who come later."""

    def __init__(self) -> None:
        self._inside = 0
        self._is_alone = False
        self._want_alone = 0
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Wait until nobody is or wants to be alone."""
        await self._until(lambda: not self._is_alone and not self._want_alone)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._changed.set()

    async def acquire_exclusive(self) -> None:
        """Wait until nobody is inside, and be alone until ``release_exclusive``."""
        self._want_alone += 1
        try:
            await self._until(lambda: not self._is_alone and not self._inside)
            self._is_alone = True
        finally:
            self._want_alone -= 1
            self._changed.set()

    def release_exclusive(self) -> None:
        """Others may come in again."""
        self._is_alone = False
        self._changed.set()

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._changed.clear()
            await self._changed.wait()
