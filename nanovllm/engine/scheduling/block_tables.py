"""Block tables: the KV blocks of every running sequence, one int32 row a seat, written where they change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


class BlockTables:
    """The rows of all seats; a device may keep a copy, whose owner reads and clears ``changed``.

    Attributes:
        rows: int32 [seats, width]; cells behind a sequence's last block are ``unused``.
        lengths: of each row the cells that are used.
        changed: the first cell of each seat's row that was written since ``changed`` was cleared.
    """

    def __init__(self, num_seats: int, width: int, unused: int = 0) -> None:
        """``width``: blocks of the longest sequence. ``unused``: a block that any step may read."""
        self.rows = np.zeros((num_seats, width), np.int32)  # which takes memory only where it is written
        if unused:
            self.rows.fill(unused)
        self.lengths = [0] * num_seats
        self.changed: dict[int, int] = {}
        self._unused = unused
        self._free = list(range(num_seats - 1, -1, -1))

    def take_seat(self) -> int:
        """A seat that no sequence has; its row is unused from end to end."""
        return self._free.pop()

    def leave(self, seat: int) -> None:
        """Give back a seat."""
        self.cut(seat, 0)
        self._free.append(seat)

    def extend(self, seat: int, blocks: Sequence[int]) -> None:
        """Append ``blocks`` to a row."""
        first = self.lengths[seat]
        end = self.lengths[seat] = first + len(blocks)
        self.rows[seat, first:end] = blocks
        self._note_change(seat, first)

    def cut(self, seat: int, length: int) -> None:
        """Keep the first ``length`` blocks of a row."""
        self.rows[seat, length : self.lengths[seat]] = self._unused
        self.lengths[seat] = length
        self._note_change(seat, length)

    def _note_change(self, seat: int, first: int) -> None:
        self.changed[seat] = min(first, self.changed.get(seat, first))

    def audit(self, tables: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Check the rows against seats and blocks of all running sequences; raises AssertionError."""
        expected = np.full_like(self.rows, self._unused)
        lengths, seats = [0] * len(self.rows), []
        for seat, blocks in tables:
            expected[seat, : len(blocks)] = blocks
            lengths[seat] = len(blocks)
            seats.append(seat)
        assert sorted([*seats, *self._free]) == list(range(len(self.rows))), "a seat is taken twice, or lost"
        assert lengths == self.lengths, "a row is longer or shorter than its sequence's blocks"
        assert np.array_equal(self.rows, expected), "a row differs from its sequence's blocks"
