"""The tokens of a sequence with drafts behind them, as a view: a copy would cost each draft the whole context."""

from __future__ import annotations

from collections import abc
from typing import overload


class DraftedTokens(abc.Sequence[int]):
    """The tokens of a sequence by now, and drafts behind them, without a copy of either."""

    def __init__(self, known: list[int], drafts: tuple[int, ...]) -> None:
        self._known, self._drafts = known, drafts
        self._num_known = len(known)

    def __len__(self) -> int:
        return self._num_known + len(self._drafts)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        places = range(len(self))[index]
        if isinstance(places, int):
            return self._known[places] if places < self._num_known else self._drafts[places - self._num_known]
        return [self[place] for place in places]
