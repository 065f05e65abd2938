"""Fair turns at a few shared members: the group that has used them for the least time is next."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairTurns(Generic[T]):
    """Members of a pool, each lent to one caller at a time; a group is a tenant. For one event loop.

    A group that comes anew starts level with the least served of those at work: it has saved up nothing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._idle: list[T] = []
        self._lent: dict[T, tuple[str, float]] = {}
        self._waiting: dict[str, deque[tuple[asyncio.Future[T], Callable[[T], bool]]]] = {}
        self._used_s: dict[str, float] = {}

    def add(self, member: T) -> None:
        """``member`` is there to be lent."""
        self._idle.append(member)
        self._hand_out()

    async def take(self, group: str, is_preferred: Callable[[T], bool] = lambda _: False) -> T:
        """A member, as soon as it is the group's turn; `give_back` ends it.

        An idle one that ``is_preferred`` is taken before others, but none is waited for.
        """
        if group not in self._used_s:
            self._used_s[group] = min(self._used_s.values(), default=0.0)
        turn: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(group, deque()).append((turn, is_preferred))
        self._hand_out()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.give_back(turn.result())  # lent in the iteration in which the call was cancelled
            raise

    def give_back(self, member: T) -> None:
        """End the turn at ``member``, which goes to the next."""
        group, since = self._lent.pop(member)
        self._used_s[group] += self._clock() - since
        self._idle.append(member)
        self._hand_out()
        if group not in self._waiting and all(other != group for other, _ in self._lent.values()):
            del self._used_s[group]

    def refuse_all(self, error: Exception) -> None:
        """Every call that waits raises ``error``, and nothing is idle any more."""
        self._idle.clear()
        waiting, self._waiting = self._waiting, {}
        for turn in (turn for turns in waiting.values() for turn, _ in turns if not turn.done()):
            turn.set_exception(error)

    def _hand_out(self) -> None:
        while self._idle and self._waiting:
            group = min(self._waiting, key=self._used_s.__getitem__)
            turn, is_preferred = self._waiting[group].popleft()
            if not self._waiting[group]:
                del self._waiting[group]
            if not turn.done():
                # The last one that came back is the warmest.
                preferred = [index for index, member in enumerate(self._idle) if is_preferred(member)]
                member = self._idle.pop(preferred[-1] if preferred else -1)
                self._lent[member] = group, self._clock()
                turn.set_result(member)
