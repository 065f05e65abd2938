"""Jobs that ended last: bounds, rates, quantiles, routes."""

from __future__ import annotations

import pytest

from nanovllm.pipeline.operations.recent_jobs import (
    KEPT_JOBS,
    MAX_ROUTES,
    OTHER_ROUTES,
    RATE_S,
    EndedJob,
    RecentJobs,
)


class Jobs:
    def __init__(self) -> None:
        self.now = 1_000.0
        self.recent = RecentJobs(clock=lambda: self.now)

    def end(self, number: int = 0, *, route: str = "jobs", infer_s: float = 1.0, output_tokens: int = 10) -> None:
        self.recent.add(EndedJob(f"j{number}", "", route, "result", None, {"infer": infer_s}, 2.0, 100, output_tokens))


def test_the_newest_come_first_and_only_so_many_are_kept() -> None:
    jobs = Jobs()
    for number in range(KEPT_JOBS + 5):
        jobs.end(number)
    assert [job.job_id for job in jobs.recent.last(2)] == [f"j{KEPT_JOBS + 4}", f"j{KEPT_JOBS + 3}"]
    assert len(jobs.recent.last(10 * KEPT_JOBS)) == KEPT_JOBS
    assert jobs.recent.routes["jobs"].jobs == KEPT_JOBS + 5


def test_rates_are_those_of_the_last_minute() -> None:
    jobs = Jobs()
    for _ in range(30):
        jobs.end()
    jobs.now += RATE_S / 2
    for _ in range(30):
        jobs.end()
    assert jobs.recent.rates() == pytest.approx({"jobs": 60 / RATE_S, "input_tokens": 100.0, "output_tokens": 10.0})
    jobs.now += RATE_S * 3 / 4
    assert jobs.recent.rates()["jobs"] == 30 / RATE_S
    jobs.now += RATE_S
    assert jobs.recent.rates()["jobs"] == 0


def test_the_rate_of_more_jobs_than_are_kept_is_that_of_their_time() -> None:
    jobs = Jobs()
    for _ in range(2 * KEPT_JOBS):
        jobs.now += 0.01
        jobs.end()
    assert jobs.recent.rates()["jobs"] == pytest.approx(100, rel=0.01)


def test_quantiles_are_of_the_kept_jobs() -> None:
    jobs = Jobs()
    assert jobs.recent.latencies() == {}
    for number in range(100):
        jobs.end(infer_s=float(number))
    assert jobs.recent.latencies() == {"total": [2.0, 2.0, 2.0], "infer": [50.0, 90.0, 99.0]}


def test_routes_beyond_a_bound_are_counted_together() -> None:
    jobs = Jobs()
    for number in range(MAX_ROUTES + 10):
        jobs.end(route=f"route-{number}", infer_s=0.5)
    assert len(jobs.recent.routes) == MAX_ROUTES + 1
    assert (jobs.recent.routes[OTHER_ROUTES].jobs, jobs.recent.routes[OTHER_ROUTES].infer_s) == (10, 5.0)
