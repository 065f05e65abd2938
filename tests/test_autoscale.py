"""The simulator of autoscaling against what KEDA and Kubernetes publish, and against a trace of the real thing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.autoscale import (
    Behaviour,
    Group,
    Hpa,
    Keda,
    LagScaler,
    Partition,
    Policy,
    Scaling,
    Workers,
    agreement,
    chart_defaults,
    replay,
    simulate,
)

TRACE = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "autoscale-trace.json"
AT_ONCE = Behaviour(0, (Policy("Percent", 100, 15),))
"""A scale-down behaviour that holds nothing back."""


def partitions_with(*lags: int) -> list[Partition]:
    found = [Partition() for _ in lags]
    for partition, lag in zip(found, lags, strict=True):
        for _ in range(lag):
            partition.append(0.0)
    return found


def synced(replicas: int, metric: float, scaling: Scaling) -> int:
    """What a fresh HPA wants."""
    return Hpa(scaling).sync(0.0, replicas, metric)


# KEDA's Kafka scaler: keda.sh/docs, scalers/apache-kafka.


def test_keda_wants_lag_by_threshold_rounded_up_and_no_more_than_partitions() -> None:
    scaling = Scaling(lag_threshold=10, target=10, max_replicas=100)
    for lag, wanted in ((1, 1), (10, 1), (11, 2), (39, 4), (4_000, 4)):
        metric, _ = LagScaler(scaling).read(partitions_with(lag, 0, 0, 0))
        # From one to more: within Kubernetes' default limit of four pods.
        assert synced(1, metric, scaling) == wanted


def test_keda_scales_beyond_partitions_where_idle_consumers_are_allowed() -> None:
    scaling = Scaling(lag_threshold=10, allow_idle_consumers=True)
    assert LagScaler(scaling).read(partitions_with(4_000, 0))[0] == 4_000
    assert LagScaler(replace(scaling, allow_idle_consumers=False)).read(partitions_with(4_000, 0))[0] == 20


def test_keda_counts_only_partitions_with_lag_where_it_is_told_so() -> None:
    scaling = Scaling(lag_threshold=10, limit_to_partitions_with_lag=True)
    assert LagScaler(scaling).read(partitions_with(500, 0, 300, 0))[0] == 20


def test_a_partition_that_stands_still_between_two_polls_has_no_lag_with_exclude_persistent_lag() -> None:
    """What makes it useless for long jobs: the offset stands still while one is at work."""
    partition = partitions_with(50)[0]
    scaler = LagScaler(Scaling(exclude_persistent_lag=True, lag_threshold=100))
    assert scaler.read([partition]) == (50, 50)
    assert scaler.read([partition]) == (0, 50)  # it is active, and yet nothing is wanted
    partition.waiting.popleft()
    assert scaler.read([partition]) == (49, 49)


def test_jobs_at_work_are_lag() -> None:
    partition = partitions_with(2)[0]
    offset, _ = partition.waiting.popleft()
    partition.at_work.add(offset)
    assert partition.lag == 2
    partition.waiting.clear()
    partition.at_work = {1}
    assert partition.lag == 1


# The cooldown is between one and none: keda.sh/docs, concepts/scaling-deployments.


def test_the_cooldown_holds_the_last_worker_alone() -> None:
    scaling = Scaling(cooldown_s=100, down=AT_ONCE)
    keda, hpa = Keda(scaling), Hpa(scaling)
    assert keda.poll(0.0, 0, is_active=True) == 1
    assert hpa.sync(1.0, 5, metric=1) == 1, "from five to one is the HPA's, within the cooldown"
    assert keda.poll(90.0, 1, is_active=False) == 1
    assert keda.poll(101.0, 1, is_active=False) == 0


def test_a_minimum_above_zero_knows_no_cooldown() -> None:
    scaling = Scaling(cooldown_s=1, min_replicas=1)
    assert Keda(scaling).poll(1_000.0, 1, is_active=False) == 1


# The HorizontalPodAutoscaler: kubernetes.io/docs, tasks/run-application/horizontal-pod-autoscale.


@pytest.mark.parametrize(("metric", "wanted"), [(40, 4), (43.9, 4), (36.1, 4), (44.1, 5), (35, 4), (29, 3)])
def test_the_hpa_does_nothing_within_a_tenth(metric: float, wanted: int) -> None:
    assert synced(4, metric, Scaling(target=10, down=AT_ONCE)) == wanted


def test_the_hpa_takes_the_most_that_was_wanted_within_the_stabilisation_window() -> None:
    hpa = Hpa(Scaling(target=10, down=Behaviour(300, (Policy("Percent", 100, 15),))))
    assert hpa.sync(0.0, 6, 60) == 6
    assert hpa.sync(150.0, 6, 20) == 6
    assert hpa.sync(299.0, 6, 20) == 6
    assert hpa.sync(301.0, 6, 20) == 2


def test_the_hpa_grows_by_four_pods_or_doubles_in_15_s_unless_told_otherwise() -> None:
    hpa = Hpa(Scaling(target=1, max_replicas=100))
    assert hpa.sync(0.0, 1, 100) == 5
    assert hpa.sync(5.0, 5, 100) == 5
    assert hpa.sync(16.0, 5, 100) == 10
    assert hpa.sync(32.0, 10, 100) == 20


def test_the_hpa_shrinks_by_a_policys_share_in_its_period() -> None:
    hpa = Hpa(Scaling(target=10, down=Behaviour(0, (Policy("Percent", 50, 60),))))
    assert hpa.sync(0.0, 8, 10) == 4
    assert hpa.sync(30.0, 4, 10) == 4
    assert hpa.sync(61.0, 4, 10) == 2


def test_the_hpa_is_off_at_zero() -> None:
    assert synced(0, 1_000, Scaling()) == 0


# Which pod goes: kubernetes.io/docs, concepts/workloads/controllers/replicaset.


def test_a_pod_that_is_not_ready_goes_first_then_the_cheapest_then_the_youngest() -> None:
    group = Group(Workers(load_s=10), Scaling(idle_first=True), seed=1)
    for at in (0.0, 1.0, 2.0, 20.0):
        group.scale(at, len(group.pods) + 1)
    busy, idle, other, _ = group.pods
    busy.jobs = [(99.0, Partition(), 0, 0.0)]
    other.jobs = [(99.0, Partition(), 0, 0.0)]
    group.scale(25.0, 3)
    assert group.pods == [busy, idle, other]
    group.scale(25.0, 2)
    assert group.pods == [busy, other]
    group.scale(25.0, 1)
    assert group.pods == [busy]


# What follows from the rules together.


def test_equal_arguments_give_equal_runs_and_every_job_is_done_once() -> None:
    workers, scaling = Workers(load_s=20), chart_defaults(Workers().seconds_per_job)
    first, second = (simulate([(0.0, 200)], workers, scaling, until_s=1_500) for _ in range(2))
    assert first == second
    assert first.unfinished == 0
    assert first.samples[-1][1:] == (0, 0), "all is done, and no worker is left"
    assert first.most_replicas == 7, "200 jobs of two seconds are 400 s of work, of which each worker has 60"


def test_workers_that_load_slowly_do_not_bring_more_of_them() -> None:
    scaling = chart_defaults(2.0)
    runs = [simulate([(0.0, 100)], Workers(load_s=load_s), scaling, until_s=3_000) for load_s in (5, 600)]
    assert [run.most_replicas for run in runs] == [4, 4]


def test_an_hpa_alone_keeps_one_worker() -> None:
    workers, scaling = Workers(load_s=20), replace(chart_defaults(2.0), keda=False)
    run = simulate([(0.0, 200)], workers, scaling, until_s=1_500)
    assert run.unfinished == 0
    assert (run.most_replicas, run.samples[-1][1]) == (7, 1)


def test_exclude_persistent_lag_takes_the_workers_of_long_jobs_away() -> None:
    workers = Workers(service_s=120, spread=0, jobs_at_once=1, load_s=10, drain_s=25, partitions=8)
    ours = chart_defaults(workers.seconds_per_job)
    right = simulate([(0.0, 16)], workers, ours, until_s=3_000)
    wrong = simulate([(0.0, 16)], workers, replace(ours, exclude_persistent_lag=True), until_s=3_000)
    assert right.given_back == 0
    assert wrong.drain_s > 1.5 * right.drain_s


def test_workers_that_go_at_once_turn_more_often_than_those_of_the_chart() -> None:
    workers = Workers()
    ours = chart_defaults(workers.seconds_per_job)
    bursts = [(150.0 * number, 120) for number in range(8)]
    hasty = replace(ours, down=AT_ONCE, cooldown_s=30)
    runs = [simulate(bursts, workers, scaling, until_s=3_000) for scaling in (ours, hasty)]
    assert runs[0].turns < runs[1].turns
    assert runs[0].given_back <= runs[1].given_back


def test_a_recorded_trace_comes_out_within_a_fifth() -> None:
    trace = json.loads(TRACE.read_text(encoding="utf-8"))
    found = agreement(trace, replay(trace))
    assert len(trace["arrivals"]) == 2
    off = {name: value for name, value in found.items() if name.endswith("_off")}
    assert len(off) == 3
    assert all(value <= 0.2 for value in off.values()), found
