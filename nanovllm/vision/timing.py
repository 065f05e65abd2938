"""Measured times of work on a device: by the clock on a CPU, by events on CUDA, which are read once they are done.

The host only launches work on CUDA, so that a clock around it measures the launches; and waiting for the work's end
would keep the host from launching more.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Timed(Protocol):
    """A measured time."""

    @property
    def seconds(self) -> float | None:
        """None until it has passed; asking does not wait."""


class Interval(Timed, Protocol):
    """A time that is being measured, from when it was made."""

    def end(self) -> None:
        """Its end: on CUDA that of the work launched so far."""


class Event(Protocol):
    """Of ``torch.cuda.Event`` with timing, what an interval needs."""

    def record(self, stream: Any) -> None:
        """Be reached when the stream's work so far is done."""

    def query(self) -> bool:
        """Whether it is reached; true too where it was never recorded."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds to ``end_event``; both are reached."""


class ClockInterval:
    """An interval of the host's clock."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        self._started = time.perf_counter()

    def end(self) -> None:
        """See Interval."""
        self.seconds = time.perf_counter() - self._started


class EventInterval:
    """An interval between two events of one stream."""

    def __init__(self, start: Event, end: Event, stream: Any) -> None:
        self._start, self._end, self._stream = start, end, stream
        self._has_ended = False
        start.record(stream)

    def end(self) -> None:
        """See Interval."""
        self._end.record(self._stream)
        self._has_ended = True

    @property
    def seconds(self) -> float | None:
        """See Timed."""
        if not self._has_ended or not self._end.query():
            return None
        return self._start.elapsed_time(self._end) / 1e3


@dataclass(frozen=True)
class Share:
    """One of ``parts`` equal parts of a time."""

    whole: Timed
    parts: int

    @property
    def seconds(self) -> float | None:
        """See Timed."""
        seconds = self.whole.seconds
        return None if seconds is None else seconds / self.parts


class TotalTime:
    """A sum of times, which each count once they have passed. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._pending: list[Timed] = []

    def add(self, timed: Timed) -> None:
        """Count a time, now or when it has passed."""
        with self._lock:
            self._pending.append(timed)
            self._settle()

    @property
    def seconds(self) -> float:
        """The sum of those that have passed."""
        with self._lock:
            self._settle()
            return self._seconds

    def _settle(self) -> None:
        pending, self._pending = self._pending, []
        for timed in pending:
            if (seconds := timed.seconds) is None:
                self._pending.append(timed)
            else:
                self._seconds += seconds


def begin(device: torch.device | str | None) -> Interval:
    """An interval of work on ``device`` (None: a CPU) that begins now, in the current stream on CUDA."""
    if device is None or str(device).partition(":")[0] != "cuda":
        return ClockInterval()
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    return EventInterval(start, end, torch.cuda.current_stream(torch.device(device)))
