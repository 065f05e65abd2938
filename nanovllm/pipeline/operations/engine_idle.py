"""Why the engine had nothing to compute: seconds by what it waited for.

While the engine has no request, time counts for the part of the worker that is next before it and has work: a job that
is being decoded is nearer to the engine than one that is being fetched. What the engine itself spends on images, while
no text is computed, is its own figure (`EngineStats.image_seconds`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Literal

from nanovllm.messages.dead_letter import Stage
from nanovllm.metrics import Metrics
from nanovllm.statistics import EngineStats

Wait = Literal["endpoint", "broker", "decode", "fetch", "admission"]

NEAREST_FIRST: tuple[Wait, ...] = ("endpoint", "broker", "decode", "fetch", "admission")
"""``endpoint``: a server that takes no requests; ``broker``: a record's acknowledgement before the engine may begin."""

_OF_STAGE: dict[Stage, Wait] = {"fetch": "fetch", "admit": "admission"}


class EngineIdle:
    """Counts ``nanovllm_engine_idle_seconds``; owned by the event loop.

    ``records_wait``: Kafka has records that the worker has not taken. With no job before the engine, an idle second is
    the broker's then, else the topic is empty.
    """

    def __init__(self, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = metrics.engine_idle_seconds
        self._clock = clock
        self._requests = 0
        self._at_work: dict[Wait, int] = dict.fromkeys(NEAREST_FIRST, 0)
        self._records_wait = False
        self._image_seconds = 0.0
        self._since = clock()
        self.request = _Inside(self._begin_request, self._end_request)
        """While it is entered, the engine has a request; any number at once."""
        self.waits = {wait: _Inside(partial(self._enter, wait), partial(self._leave, wait)) for wait in NEAREST_FIRST}
        """While one is entered, a job waits for it; any number at once."""

    @property
    def records_wait(self) -> bool:
        """Whether Kafka has records that the worker has not taken."""
        return self._records_wait

    @records_wait.setter
    def records_wait(self, value: bool) -> None:
        if value != self._records_wait:
            self._charge()
            self._records_wait = value

    def enter_stage(self, stage: Stage) -> None:
        """A job enters ``stage``."""
        if (wait := _OF_STAGE.get(stage)) is not None:
            self._enter(wait)

    def leave_stage(self, stage: Stage) -> None:
        """A job leaves ``stage``."""
        if (wait := _OF_STAGE.get(stage)) is not None:
            self._leave(wait)

    def observe(self, stats: EngineStats) -> None:
        """Count until now, and what ``stats`` say of images."""
        self._charge()
        self._seconds.labels("encode").inc(max(0.0, stats.image_seconds - self._image_seconds))
        self._image_seconds = stats.image_seconds

    @property
    def reason(self) -> str:
        """What an engine without a request waits for now."""
        for wait in NEAREST_FIRST:
            if self._at_work[wait]:
                return wait
        return "broker" if self._records_wait else "empty"

    @property
    def current(self) -> str | None:
        """What the engine waits for now; None while it has a request."""
        return None if self._requests else self.reason

    def _charge(self) -> None:
        now = self._clock()
        if not self._requests:
            self._seconds.labels(self.reason).inc(now - self._since)
        self._since = now

    def _enter(self, wait: Wait) -> None:
        if not self._requests:
            self._charge()
        self._at_work[wait] += 1

    def _leave(self, wait: Wait) -> None:
        if not self._requests:
            self._charge()
        self._at_work[wait] -= 1

    def _begin_request(self) -> None:
        if not self._requests:
            self._charge()
        self._requests += 1

    def _end_request(self) -> None:
        self._requests -= 1
        if not self._requests:
            self._since = self._clock()


class _Inside:
    """A context manager without state of its own, which many may have entered."""

    def __init__(self, enter: Callable[[], None], leave: Callable[[], None]) -> None:
        self._enter = enter
        self._leave = leave

    def __enter__(self) -> None:
        self._enter()

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._leave()
