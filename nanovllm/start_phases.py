"""Phases of a process's start, and the seconds of each, from the beginning of the process to its first token.

Phases run beside one another: their sum may be more than what the start took. What runs inside another phase of the
same thread counts for itself alone.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path


class Phase(StrEnum):
    """What a start consists of, in about the order in which it begins."""

    IMPORTS = "imports"
    BROKERS = "brokers"
    ROUTES = "routes"
    DIGEST = "digest"
    TOKENIZER = "tokenizer"
    KERNELS = "kernels"
    WEIGHTS = "weights"
    PACKING = "packing"
    HUGE_PAGES = "huge pages"
    DECODERS = "decoders"
    GROUP = "group"
    FIRST_TOKEN = "first token"  # noqa: S105 (a phase)


class StartPhases:
    """The phases of a start, which any thread may add to."""

    def __init__(self, began: float) -> None:
        self._began = began  # by time.monotonic()
        self._seconds: dict[Phase, float] = {}
        self._lock = threading.Lock()
        self._inside = threading.local()

    def age_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def add(self, phase: Phase, seconds: float) -> None:
        """Count ``seconds`` for ``phase``."""
        with self._lock:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    @contextmanager
    def timed(self, phase: Phase) -> Iterator[None]:
        """Count the block's seconds for ``phase``, without those of phases inside it."""
        around = getattr(self._inside, "seconds", 0.0)
        self._inside.seconds, started = 0.0, time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - started
            self.add(phase, took - self._inside.seconds)
            self._inside.seconds = around + took

    def seconds(self) -> dict[Phase, float]:
        """The seconds of each phase so far, in the order of `Phase`."""
        with self._lock:
            return {phase: self._seconds[phase] for phase in Phase if phase in self._seconds}

    def __str__(self) -> str:
        return ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self.seconds().items())


def _process_age_s() -> float:
    """Seconds since the process began, to a hundredth, where Linux tells; else 0."""
    try:
        began_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


START = StartPhases(time.monotonic() - _process_age_s())
"""The start of this process. Of several engines in one, the phases add up."""
