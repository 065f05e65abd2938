"""Counting dead letters in a row, so that a worker that buries everything stops doing so."""

from __future__ import annotations

from nanovllm.errors import PoisonLimitReached


class DeadLetterLimit:
    """Lets ``limit`` dead letters pass without an answer between them, and no further one; None lets all pass."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._in_a_row = 0

    def answered(self) -> None:
        """A job was answered: not everything is poison."""
        self._in_a_row = 0

    def bury(self) -> None:
        """One more dead letter is about to be published.

        Raises:
            PoisonLimitReached: it would be one too many.
        """
        if not self.bury_up_to(1):
            raise self.reached()

    def bury_up_to(self, count: int) -> int:
        """How many of ``count`` more dead letters may be published, which are counted as if they were."""
        allowed = count if self._limit is None else min(count, self._limit - self._in_a_row)
        self._in_a_row += allowed
        return allowed

    def reached(self) -> PoisonLimitReached:
        """What to raise instead of one more."""
        return PoisonLimitReached(f"{self._in_a_row} jobs in a row became dead letters (dead_letters.poison_limit)")
