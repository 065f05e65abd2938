"""Exponential backoff with full jitter."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """Exponential waits with full jitter, so that workers that failed together do not come back together.

    ``base_s`` is the longest first wait; it doubles with each attempt up to ``cap_s``.
    """

    base_s: float = 0.5
    cap_s: float = 10.0

    def wait_s(self, attempt: int) -> float:
        """Seconds to wait after failed attempt number ``attempt`` (1 is the first)."""
        return random.uniform(0.0, self.longest_s(attempt))

    def longest_s(self, attempt: int) -> float:
        """The bound of ``wait_s``."""
        return min(self.cap_s, self.base_s * 2.0 ** min(attempt - 1, 32))
