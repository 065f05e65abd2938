"""The limit of dead letters in a row (``dead_letters.poison_limit``): a worker that answers nothing ends."""

from __future__ import annotations

from nanovllm.errors import PoisonLimitReached


class DeadLetterLimit:
    """At most ``limit`` dead letters without an answer between them; None: no limit."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._in_a_row = 0

    def reset(self) -> None:
        """A job was answered."""
        self._in_a_row = 0

    def count(self, wanted: int = 1) -> int:
        """Count dead letters before they are published; returns how many of the ``wanted`` may be.

        Raises:
            PoisonLimitReached: not a single one.
        """
        allowed = wanted if self._limit is None else min(wanted, self._limit - self._in_a_row)
        if allowed <= 0:
            raise PoisonLimitReached(f"{self._in_a_row} jobs in a row became dead letters (dead_letters.poison_limit)")
        self._in_a_row += allowed
        return allowed
