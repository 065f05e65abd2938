"""The limit of dead letters in a row (``dead_letters.poison_limit``): a worker that answers nothing ends."""

from __future__ import annotations

from nanovllm.errors import PoisonLimitReached


class DeadLetterLimit:
    """Lets ``limit`` dead letters pass without an answer between them, and no further one; None lets all pass."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._in_a_row = 0

    def reset(self) -> None:
        """A job was answered: the row begins anew."""
        self._in_a_row = 0

    def count(self) -> None:
        """Count a dead letter before it is published.

        Raises:
            PoisonLimitReached: it would be one too many.
        """
        if not self.count_up_to(1):
            raise self.reached()

    def count_up_to(self, count: int) -> int:
        """How many of ``count`` more dead letters may be published; they are counted."""
        allowed = count if self._limit is None else min(count, self._limit - self._in_a_row)
        self._in_a_row += allowed
        return allowed

    def reached(self) -> PoisonLimitReached:
        """The error in place of one more."""
        return PoisonLimitReached(f"{self._in_a_row} jobs in a row became dead letters (dead_letters.poison_limit)")
