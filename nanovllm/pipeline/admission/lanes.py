"""Lane turns: the most urgent lane first, and now and then one that would starve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

OVERTAKEN_AT_MOST = 7
"""Times that others may go before a lane that waits."""


class LaneTurns:
    """Lower lanes first; one that has been overtaken ``OVERTAKEN_AT_MOST`` times is next."""

    def __init__(self) -> None:
        self._overtaken: Counter[int] = Counter()

    def is_owed(self, lane: int) -> bool:
        """Whether the lane has been overtaken as often as it may be."""
        return self._overtaken[lane] >= OVERTAKEN_AT_MOST

    def next(self, waiting: Collection[int]) -> int:
        """The lane whose turn it is, of those that wait (at least one)."""
        owed = [lane for lane in waiting if self.is_owed(lane)]
        return max(owed, key=self._overtaken.__getitem__) if owed else min(waiting)

    def serve(self, lane: int, waiting: Collection[int]) -> None:
        """``lane`` had a turn, while all of ``waiting`` wanted one."""
        for other in waiting:
            self._overtaken[other] += 1
        self._overtaken[lane] = 0
