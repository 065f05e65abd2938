"""Order by record key: jobs of a partition with equal keys run one after another."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable


class KeyOrder:
    """Gives each job its turn behind the one of the same key that was delivered before it.

    ``join`` is called in the order of delivery. Jobs of different keys know nothing of one another.
    """

    def __init__(self) -> None:
        self._last: dict[Hashable, KeyTurn] = {}

    def join(self, key: Hashable) -> KeyTurn:
        """The turn behind the last one of ``key``; end it whatever becomes of the job."""
        turn = self._last[key] = KeyTurn(self._last, key)
        return turn


class KeyTurn:
    """One job's position in the order of its key."""

    def __init__(self, last: dict[Hashable, KeyTurn], key: Hashable) -> None:
        self._last = last
        self._key = key
        self._before = last.get(key)
        self._ended = asyncio.Event()

    async def wait(self) -> None:
        """Return when every earlier job of the key has ended."""
        before = self._before
        while before is not None:
            await before._ended.wait()
            # One that was cancelled while it waited ended before its own predecessor did.
            before = before._before
        self._before = None

    def end(self) -> None:
        """The job ended: the next one may begin. Again does nothing."""
        self._ended.set()
        if self._last.get(self._key) is self:
            del self._last[self._key]
