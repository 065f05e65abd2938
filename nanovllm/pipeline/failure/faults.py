"""Systemic faults: while one is present, the worker takes no work and says so."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from nanovllm.errors import NanoVLLMError
from nanovllm.metrics import Metrics
from nanovllm.pipeline.operations.health import Health

logger = logging.getLogger(__name__)


class ActiveFaults:
    """The parts that are known not to work now.

    A fault ends when its part works again, and lapses some time after the last report (``lapse_s`` unless the report
    says otherwise): the jobs that kept trying may have expired, and then new work must find out.
    """

    def __init__(
        self, health: Health, metrics: Metrics, *, lapse_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._health = health
        self._metrics = metrics
        self._lapse_s = lapse_s
        self._clock = clock
        self._faults: dict[str, tuple[str, float]] = {}
        self._since: dict[str, float] = {}
        """When each part failed first that has not worked again, whether its fault has lapsed or not."""

    @property
    def are_present(self) -> bool:
        """Whether anything is reported that has not lapsed."""
        return any(self._clock() < lapses for _, lapses in self._faults.values())

    def report(self, part: str, error: NanoVLLMError, *, lapse_s: float | None = None) -> None:
        """``part`` does not work; a cause is logged when it is another one than before."""
        text = str(error)
        if self._faults.get(part, ("", 0.0))[0] != text:
            logger.error("%s: %s; taking no work until it is back", part, text)
        self._since.setdefault(part, self._clock())
        self._faults[part] = (text, self._clock() + (self._lapse_s if lapse_s is None else lapse_s))
        self.observe()

    def clear(self, part: str) -> None:
        """``part`` works."""
        if (since := self._since.pop(part, None)) is not None:
            logger.info("%s: works again, after %.0f s", part, self._clock() - since)
            self._faults.pop(part, None)
            self.observe()

    def observe(self) -> None:
        """Forget what has lapsed, and tell health and metrics the rest."""
        now = self._clock()
        self._faults = {part: fault for part, fault in self._faults.items() if now < fault[1]}
        self._health.systemic = "; ".join(f"{part}: {text}" for part, (text, _) in self._faults.items()) or None
        self._metrics.is_systemic.set(1 if self._faults else 0)
