"""Circuit breaker of one endpoint: open, one request at a time tries it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass


@dataclass(eq=False)
class Breaker:
    """Closed, every request passes. After ``threshold`` different requests failed with no answer between, it opens.

    One request that makes a server fail again and again opens nothing alone. Open, it waits ``first_wait_s``, then
    lets one request try; the wait doubles with every try that fails, up to ``longest_wait_s``. Once that request has
    its first token others pass too, and the next failure before its end opens again.
    """

    _: KW_ONLY
    threshold: int
    first_wait_s: float
    longest_wait_s: float
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._failing: set[str] = set()
        self._openings = 0
        self._is_trying = False
        self._is_on_trial = False
        self.is_open = False
        self.open_until = 0.0

    @property
    def may_try(self) -> bool:
        """Whether it is open and the next request may try the endpoint."""
        return self.is_open and not self._is_trying and self.clock() >= self.open_until

    @property
    def is_trying(self) -> bool:
        """Whether a request tries the endpoint now."""
        return self._is_trying

    def begin_trial(self) -> None:
        """The next request tries the endpoint."""
        self._is_trying = True

    def end_trial(self) -> None:
        """The request that tried has ended somehow: another may, unless its failure was counted."""
        self._is_trying = False

    def first_token(self) -> None:
        """A request got the beginning of its answer."""
        if self.is_open:
            self.is_open, self._is_on_trial = False, True

    def succeed(self) -> None:
        """A request was answered."""
        self._failing.clear()
        self._openings = 0
        self.is_open = self._is_on_trial = False

    def fail(self, request: str, *, at_once: bool = False) -> None:
        """``request`` failed by the endpoint's fault; ``at_once`` opens whatever was before."""
        self._failing.add(request)
        if self.is_open and not self._is_trying:
            return  # a request that began before the circuit opened
        if at_once or self.is_open or self._is_on_trial or len(self._failing) >= self.threshold:
            wait_s = min(self.longest_wait_s, self.first_wait_s * 2.0 ** min(self._openings, 32))
            self._openings += 1
            self.is_open, self._is_on_trial = True, False
            self.open_until = self.clock() + wait_s
