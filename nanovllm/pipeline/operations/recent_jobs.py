"""Jobs that ended last, without their texts, and what each route's jobs took."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nanovllm.messages.dead_letter import Stage
from nanovllm.value_object import changed, value_object

KEPT_JOBS = 1_000
RATE_S = 60.0
MAX_ROUTES = 100
"""Routes that are told apart; the jobs of further ones are counted together, as of ``OTHER_ROUTES``."""
OTHER_ROUTES = "others"
QUANTILES = (0.5, 0.9, 0.99)


@value_object
class EndedJob:
    """One job that ended: seconds by stage, and its outcome with the code of what it failed with."""

    job_id: str
    tenant: str
    route: str
    outcome: str
    code: str | None
    seconds: Mapping[Stage, float]
    total_s: float
    input_tokens: int = 0
    output_tokens: int = 0
    ended_at: float = 0.0


@dataclass
class RouteTotals:
    """What the jobs of one route took since the start; ``infer_s`` is their time at the engine."""

    jobs: int = 0
    infer_s: float = 0.0


class RecentJobs:
    """Keeps the jobs that ended last; written by the event loop, read by any thread."""

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._jobs: deque[EndedJob] = deque(maxlen=KEPT_JOBS)
        self._routes: defaultdict[str, RouteTotals] = defaultdict(RouteTotals)

    def add(self, job: EndedJob) -> None:
        """Keep ``job``, which has ended now."""
        self._jobs.append(changed(job, ended_at=self._clock()))
        known = job.route in self._routes or len(self._routes) < MAX_ROUTES
        totals = self._routes[job.route if known else OTHER_ROUTES]
        totals.jobs += 1
        totals.infer_s += job.seconds.get("infer", 0.0)

    def last(self, count: int) -> list[EndedJob]:
        """The jobs that ended last, the newest first."""
        return list(self._jobs)[: -count - 1 : -1]

    @property
    def routes(self) -> dict[str, RouteTotals]:
        """The totals of each route."""
        return dict(self._routes)

    def rates(self) -> dict[str, float]:
        """Jobs and tokens a second over the last ``RATE_S``, or over the time that the kept jobs cover."""
        now, jobs = self._clock(), list(self._jobs)
        since = now - RATE_S
        if len(jobs) == KEPT_JOBS:
            since = max(since, jobs[0].ended_at)
        recent = [job for job in jobs if job.ended_at >= since]
        span = max(now - since, 1e-3)
        return {
            "jobs": len(recent) / span,
            "input_tokens": sum(job.input_tokens for job in recent) / span,
            "output_tokens": sum(job.output_tokens for job in recent) / span,
        }

    def latencies(self) -> dict[str, list[float]]:
        """Seconds at ``QUANTILES`` of the kept jobs by stage, and of ``total``."""
        of_stage: defaultdict[str, list[float]] = defaultdict(list)
        for job in list(self._jobs):
            of_stage["total"].append(job.total_s)
            for stage, seconds in job.seconds.items():
                of_stage[stage].append(seconds)
        return {stage: _at_quantiles(sorted(seconds)) for stage, seconds in of_stage.items()}


def _at_quantiles(ordered: Sequence[float]) -> list[float]:
    return [ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in QUANTILES]
