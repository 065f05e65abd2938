"""Circuit breaker of one endpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass


@dataclass(eq=False)
class Breaker:
    """Closed, every request passes; open, none. Open, it waits ``first_wait_s``, then one request may try.

    It is suspect once ``threshold`` different requests failed with no answer between: what is in them may be to blame,
    so a request of the backend's own decides whether it opens. The wait doubles each time, up to ``longest_wait_s``.
    """

    _: KW_ONLY
    threshold: int
    first_wait_s: float
    longest_wait_s: float
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._failing: set[str] = set()
        self._openings = 0
        self.is_open = False
        self.is_trying = False
        self.open_until = 0.0
        self._opened_at = 0.0

    @property
    def open_for_s(self) -> float:
        """Seconds for which it has been open."""
        return self.clock() - self._opened_at

    @property
    def has_waited(self) -> bool:
        """Whether it is open, and its wait is over."""
        return self.is_open and self.clock() >= self.open_until

    @property
    def is_left_out(self) -> bool:
        """Whether it is open, and no request tries it."""
        return self.is_open and not self.is_trying

    @property
    def may_try(self) -> bool:
        """Whether it is open and the next request may try the endpoint."""
        return self.has_waited and not self.is_trying

    @property
    def is_suspect(self) -> bool:
        """Whether it is to be found out if the endpoint answers at all."""
        return not self.is_open and len(self._failing) >= self.threshold

    def fail(self, request: str) -> None:
        """``request`` failed by the endpoint's fault."""
        self._failing.add(request)

    def succeed(self) -> None:
        """A request was answered."""
        self._failing.clear()
        self._openings = 0
        self.is_open = False

    def open(self) -> None:
        """Let no request pass for a while."""
        wait_s = min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(self._openings, 32))
        self._openings += 1
        now = self.clock()
        if not self.is_open:
            self._opened_at = now
        self.is_open = True
        self.open_until = now + wait_s
