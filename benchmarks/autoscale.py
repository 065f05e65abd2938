"""Autoscaling simulated: load traces against the rules of KEDA's Kafka scaler and of the HorizontalPodAutoscaler.

    python benchmarks/autoscale.py                      # the chart's defaults against naive settings; JSON and SVG
    python benchmarks/autoscale.py --record FILE        # a real trace: Apache Kafka, KEDA and a control plane, minutes

Partitions, workers that load, take jobs, drain and leave; KEDA's polls, the HPA's syncs, and which pod goes first. The
rules are those of the documentation of KEDA 2.20 and Kubernetes 1.35. Time passes in steps; nothing here waits.
`tests/test_autoscale.py` holds it against rules that are published and against a recorded trace.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks.output import add_output, write_text
from benchmarks.plot import draw_steps

VALUES = Path(__file__).resolve().parent.parent / "helm" / "nanovllm" / "values.yaml"
HOUR_S = 3600.0
NOTHING_S = math.inf

Arrivals = Sequence[tuple[float, int]]
"""Seconds since the start, in order, and how many jobs came."""


@dataclass(frozen=True)
class Policy:
    """A limit of the HPA's behaviour: so many pods, or so many percent of them, within ``period_s``."""

    type: Literal["Pods", "Percent"]
    value: int
    period_s: float


@dataclass(frozen=True)
class Behaviour:
    """One direction of an HPA's ``behavior``."""

    window_s: float
    policies: tuple[Policy, ...]


SCALE_UP = Behaviour(0, (Policy("Pods", 4, 15), Policy("Percent", 100, 15)))
SCALE_DOWN = Behaviour(300, (Policy("Percent", 100, 15),))
"""Kubernetes' defaults."""


@dataclass(frozen=True)
class Scaling:
    """What a ScaledObject with one Kafka trigger says; the field's defaults are KEDA's and Kubernetes'.

    ``per_message`` turns messages into the metric, of which each worker gets ``target``: 1, or with the chart's formula
    seconds of a job. ``formula``: KEDA is active by the formula, not by the lag. ``keda`` False is an HPA alone, which
    polls nothing and never scales to zero.
    """

    target: float = 10
    per_message: float = 1
    formula: bool = False
    min_replicas: int = 0
    max_replicas: int = 8
    polling_s: float = 30
    cooldown_s: float = 300
    lag_threshold: int = 10
    activation: float = 0
    allow_idle_consumers: bool = False
    limit_to_partitions_with_lag: bool = False
    exclude_persistent_lag: bool = False
    sync_s: float = 15
    tolerance: float = 0.1
    up: Behaviour = SCALE_UP
    down: Behaviour = SCALE_DOWN
    idle_first: bool = False
    keda: bool = True


@dataclass(frozen=True)
class Workers:
    """What a worker is: ``service_s`` a job with ``jobs_at_once`` beside one another, ``load_s`` from pod to member.

    A job's time is drawn from a lognormal distribution of that mean; ``spread`` is its sigma. A worker told to stop
    gives back after ``drain_s`` what it has not finished. A changed membership stops all for ``rebalance_s``.
    """

    partitions: int = 16
    service_s: float = 16
    spread: float = 0.5
    jobs_at_once: int = 8
    load_s: float = 90
    drain_s: float = 25
    rebalance_s: float = 3

    @property
    def seconds_per_job(self) -> float:
        """Seconds of one busy worker for a job."""
        return self.service_s / self.jobs_at_once


class Partition:
    """Offsets of one partition: those that wait, those at work, and the one that is committed."""

    def __init__(self) -> None:
        self.end = 0
        self.waiting: deque[tuple[int, float]] = deque()  # offset, time of its arrival
        self.at_work: set[int] = set()

    def append(self, now: float) -> None:
        """A message arrives."""
        self.waiting.append((self.end, now))
        self.end += 1

    def give_back(self, offset: int, arrived: float) -> None:
        """A job that was not finished is read again, before what came later."""
        self.at_work.discard(offset)
        self.waiting.appendleft((offset, arrived))

    @property
    def committed(self) -> int:
        """The first offset that is not finished; the end where all are."""
        unfinished = [*self.at_work, *(offset for offset, _ in itertools.islice(self.waiting, 1))]
        return min(unfinished, default=self.end)

    @property
    def lag(self) -> int:
        """Messages that are not committed: jobs at work are among them."""
        return self.end - self.committed


class LagScaler:
    """KEDA's Kafka scaler: the lag as its metric, and the lag by which it is active."""

    def __init__(self, scaling: Scaling) -> None:
        self._scaling = scaling
        self._previous: dict[int, int] = {}

    def read(self, partitions: Sequence[Partition]) -> tuple[int, int]:
        """Metric and activity, in messages; a partition that stands still since the last call may not count."""
        scaling, metric, activity, with_lag = self._scaling, 0, 0, 0
        for number, partition in enumerate(partitions):
            committed, lag = partition.committed, partition.lag
            activity += lag
            if scaling.exclude_persistent_lag and self._previous.get(number) == committed:
                continue
            self._previous[number] = committed
            metric += lag
            with_lag += lag > 0
        if not scaling.allow_idle_consumers or scaling.limit_to_partitions_with_lag:
            bound = with_lag if scaling.limit_to_partitions_with_lag else len(partitions)
            if metric // scaling.lag_threshold > bound:  # in whole workers: up to one more is let through
                metric = bound * scaling.lag_threshold
        return metric, activity


class Hpa:
    """The HorizontalPodAutoscaler on one external metric with a target of the type AverageValue."""

    def __init__(self, scaling: Scaling) -> None:
        self._scaling = scaling
        self._wanted: list[tuple[float, int]] = []
        self._changes: list[tuple[float, int]] = []

    def sync(self, now: float, replicas: int, metric: float) -> int:
        """How many replicas there shall be; with none the HPA is off."""
        scaling = self._scaling
        if replicas == 0:
            return 0
        least = max(1, scaling.min_replicas)
        if not least <= replicas <= scaling.max_replicas:
            return self._changed(now, replicas, min(max(replicas, least), scaling.max_replicas))
        ratio = metric / (scaling.target * replicas)
        wanted = replicas if abs(1 - ratio) <= scaling.tolerance else math.ceil(metric / scaling.target)
        wanted = self._stabilised(now, replicas, wanted)
        if wanted > replicas:
            wanted = min(wanted, self._limit(now, replicas, scaling.up, 1))
        elif wanted < replicas:
            wanted = max(wanted, self._limit(now, replicas, scaling.down, -1))
        return self._changed(now, replicas, min(max(wanted, least), scaling.max_replicas))

    def _stabilised(self, now: float, replicas: int, wanted: int) -> int:
        """Not above the least that was wanted in the window for growing, nor below the most in that for shrinking."""
        if not self._wanted:
            self._wanted.append((now, replicas))
        longest_s = max(self._scaling.up.window_s, self._scaling.down.window_s)
        self._wanted = [(at, count) for at, count in self._wanted if at > now - longest_s]
        up = min([wanted, *(count for at, count in self._wanted if at > now - self._scaling.up.window_s)])
        down = max([wanted, *(count for at, count in self._wanted if at > now - self._scaling.down.window_s)])
        self._wanted.append((now, wanted))
        return min(max(replicas, up), down)

    def _limit(self, now: float, replicas: int, behaviour: Behaviour, sign: int) -> int:
        """How far the policy that allows most lets the number go."""
        limits = []
        for policy in behaviour.policies:
            before = replicas - sum(change for at, change in self._changes if at > now - policy.period_s)
            if policy.type == "Pods":
                limits.append(before + sign * policy.value)
            else:
                share = before * (1 + sign * policy.value / 100)
                limits.append(math.ceil(share) if sign > 0 else int(share))
        return max([replicas, *limits]) if sign > 0 else min([replicas, *limits])

    def _changed(self, now: float, replicas: int, wanted: int) -> int:
        if wanted != replicas:
            self._changes = [one for one in self._changes if one[0] > now - HOUR_S] + [(now, wanted - replicas)]
        return wanted


class Keda:
    """KEDA's own part: from none to one while a trigger is active, and to none after the cooldown."""

    def __init__(self, scaling: Scaling) -> None:
        self._scaling = scaling
        self._active_at = -NOTHING_S

    def poll(self, now: float, replicas: int, is_active: bool) -> int:
        """How many replicas there shall be: between one and many, that is the HPA's."""
        scaling = self._scaling
        if is_active:
            self._active_at = now
            return max(1, scaling.min_replicas) if replicas == 0 else replicas
        if scaling.min_replicas == 0 and now - self._active_at > scaling.cooldown_s:
            return 0
        return max(replicas, scaling.min_replicas)


@dataclass
class Worker:
    """A pod: it loads, is a member of the group, and leaves."""

    created: float
    ready_at: float
    partitions: list[Partition] = field(default_factory=list)
    jobs: list[tuple[float, Partition, int, float]] = field(default_factory=list)  # end, partition, offset, arrival
    stopped_at: float = NOTHING_S


class Group:
    """The workers of a Deployment as members of one consumer group."""

    def __init__(self, workers: Workers, scaling: Scaling, seed: int) -> None:
        self._workers, self._idle_first = workers, scaling.idle_first
        self._random = random.Random(seed)
        self._members: list[Worker] = []
        self._paused_until = 0.0
        self.partitions = [Partition() for _ in range(workers.partitions)]
        self.pods: list[Worker] = []  # those that the Deployment counts
        self._leaving: list[Worker] = []
        self.waits: list[float] = []
        self.done_at: list[float] = []
        self.given_back = 0

    @property
    def lag(self) -> int:
        """Messages that are not committed."""
        return sum(partition.lag for partition in self.partitions)

    def scale(self, now: float, replicas: int) -> None:
        """Make or end pods until there are ``replicas``."""
        while len(self.pods) < replicas:
            self.pods.append(Worker(now, now + self._workers.load_s))
        if len(self.pods) == replicas:
            return
        for victim in sorted(self.pods, key=lambda pod: self._rank(now, pod))[: len(self.pods) - replicas]:
            self.pods.remove(victim)
            victim.stopped_at = now
            self._leaving.append(victim)

    def _rank(self, now: float, pod: Worker) -> tuple[bool, int, float]:
        """Which pod a ReplicaSet ends first: one that is not ready, the cheapest to delete, the youngest."""
        return pod.ready_at <= now, len(pod.jobs).bit_length() if self._idle_first else 0, -pod.created

    def step(self, now: float) -> None:
        """Jobs end, members come and go, jobs begin."""
        for worker in [*self.pods, *self._leaving]:
            self._end_jobs(now, worker)
        for worker in list(self._leaving):
            if not worker.jobs or now >= worker.stopped_at + self._workers.drain_s:
                for _, partition, offset, arrived in sorted(worker.jobs, key=lambda job: -job[2]):
                    partition.give_back(offset, arrived)
                self.given_back += len(worker.jobs)
                self._leaving.remove(worker)
        members = [worker for worker in [*self.pods, *self._leaving] if worker.ready_at <= now]
        members.sort(key=lambda worker: (worker.created, id(worker)))
        if [id(one) for one in members] != [id(one) for one in self._members]:
            self._paused_until = now + self._workers.rebalance_s
            self._members = members
            for number, member in enumerate(members):
                member.partitions = self.partitions[number :: len(members)]
        if now >= self._paused_until:
            for worker in self._members:
                if worker.stopped_at > now:
                    self._begin_jobs(now, worker)

    def _end_jobs(self, now: float, worker: Worker) -> None:
        for job in [job for job in worker.jobs if job[0] <= now]:
            worker.jobs.remove(job)
            ended, partition, offset, arrived = job
            partition.at_work.discard(offset)
            self.waits.append(ended - arrived)
            self.done_at.append(ended)

    def _begin_jobs(self, now: float, worker: Worker) -> None:
        """Take jobs from the worker's partitions in turn while it has room."""
        while len(worker.jobs) < self._workers.jobs_at_once:
            partition = max(worker.partitions, key=lambda one: len(one.waiting), default=None)
            if partition is None or not partition.waiting:
                return
            offset, arrived = partition.waiting.popleft()
            partition.at_work.add(offset)
            worker.jobs.append((now + self._service_s(), partition, offset, arrived))

    def _service_s(self) -> float:
        mean, sigma = self._workers.service_s, self._workers.spread
        return mean * self._random.lognormvariate(-sigma * sigma / 2, sigma) if sigma else mean


@dataclass(frozen=True)
class Run:
    """What came of a trace: samples of (second, replicas, lag), and figures."""

    samples: list[tuple[float, int, int]]
    drain_s: float
    """From the last arrival until nothing was left; infinite where something was."""
    worker_seconds: float
    """Of pods that loaded, worked or idled."""
    wait_s: float
    """Mean from a job's arrival to its end."""
    wait_p95_s: float
    changes: int
    """Of the number of replicas."""
    turns: int
    """Changes against the direction of the one before."""
    most_replicas: int
    given_back: int
    """Jobs that a worker had begun and could not finish, so that another did."""
    unfinished: int

    def figures(self) -> dict[str, float | int | None]:
        """All but the samples, for JSON: what has no end is null."""
        values = {name: value for name, value in asdict(self).items() if name != "samples"}
        return {name: None if value == NOTHING_S else round(value, 1) for name, value in values.items()}


def simulate(
    arrivals: Arrivals, workers: Workers, scaling: Scaling, *, until_s: float, step_s: float = 0.5, seed: int = 1
) -> Run:
    """Let ``arrivals`` come, and watch for ``until_s`` seconds; equal arguments give equal runs."""
    group, scaler, hpa, keda = Group(workers, scaling, seed), LagScaler(scaling), Hpa(scaling), Keda(scaling)
    replicas = scaling.min_replicas if scaling.keda else max(1, scaling.min_replicas)
    group.scale(0.0, replicas)
    coming, numbers = deque(arrivals), itertools.count()
    # The first job comes in the middle of an interval, as the mean one does.
    next_poll, next_sync = scaling.polling_s / 2 if scaling.keda else NOTHING_S, scaling.sync_s / 2
    worker_seconds = 0.0
    samples: list[tuple[float, int, int]] = []
    for tick in range(round(until_s / step_s) + 1):
        now = tick * step_s
        while coming and coming[0][0] <= now:
            at, count = coming.popleft()
            for _ in range(count):
                group.partitions[next(numbers) % workers.partitions].append(at)
        group.step(now)
        if now >= next_poll:
            next_poll += scaling.polling_s
            replicas = keda.poll(now, replicas, _is_active(scaler, group, scaling))
        if now >= next_sync:
            next_sync += scaling.sync_s
            if replicas:
                metric, _ = scaler.read(group.partitions)
                replicas = hpa.sync(now, replicas, metric * scaling.per_message)
        group.scale(now, replicas)
        worker_seconds += replicas * step_s
        if not samples or samples[-1][1] != replicas or tick % max(1, round(1 / step_s)) == 0:
            samples.append((now, replicas, group.lag))
    last = max((at for at, count in arrivals if count), default=0.0)
    left = group.lag
    waits = sorted(group.waits)
    return Run(
        samples,
        drain_s=NOTHING_S if left or not group.done_at else max(group.done_at) - last,
        worker_seconds=worker_seconds,
        wait_s=sum(waits) / len(waits) if waits else 0.0,
        wait_p95_s=waits[int(0.95 * (len(waits) - 1))] if waits else 0.0,
        **_movement(samples),
        given_back=group.given_back,
        unfinished=left,
    )


def _is_active(scaler: LagScaler, group: Group, scaling: Scaling) -> bool:
    """With a formula what it gives counts; without one the lag, persistent or not."""
    metric, activity = scaler.read(group.partitions)
    return (metric if scaling.formula else activity) * scaling.per_message > scaling.activation


def _movement(samples: Sequence[tuple[float, int, int]]) -> dict[str, int]:
    counts = [replicas for _, replicas, _ in samples]
    steps = [after - before for before, after in itertools.pairwise(counts) if after != before]
    turns = sum(1 for before, after in itertools.pairwise(steps) if before * after < 0)
    return {"changes": len(steps), "turns": turns, "most_replicas": max(counts, default=0)}


# What is compared.


def chart_defaults(seconds_per_job: float, values: Path = VALUES) -> Scaling:
    """The chart's values of keda, where a job is known, or measured, to take ``seconds_per_job`` of a worker."""
    chart = yaml.safe_load(values.read_text(encoding="utf-8"))
    keda = chart["keda"]
    down = keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]
    policies = tuple(Policy(one["type"], one["value"], one["periodSeconds"]) for one in down["policies"])
    return Scaling(
        target=keda["secondsPerWorker"],
        per_message=seconds_per_job,
        formula=True,
        min_replicas=keda["minReplicaCount"],
        max_replicas=keda["maxReplicaCount"],
        polling_s=keda["pollingInterval"],
        cooldown_s=keda["cooldownPeriod"],
        lag_threshold=math.ceil(keda["secondsPerWorker"] / seconds_per_job),
        activation=keda["activationLagThreshold"] * seconds_per_job,
        allow_idle_consumers=keda["allowIdleConsumers"],
        limit_to_partitions_with_lag=keda["limitToPartitionsWithLag"],
        exclude_persistent_lag=keda["excludePersistentLag"],
        down=Behaviour(down["stabilizationWindowSeconds"], policies),
    )


def contestants(workers: Workers) -> dict[str, Scaling]:
    """The chart's defaults, and what is met elsewhere: messages as a measure, and workers that go at once."""
    ours = chart_defaults(workers.seconds_per_job)
    at_once = Behaviour(0, (Policy("Percent", 100, 15),))
    soon = replace(ours, cooldown_s=30, down=at_once)
    hasty = Scaling(polling_s=15, cooldown_s=30, down=at_once)
    return {
        "chart": ours,
        "chart, pods go at once": soon,
        "chart, pods go at once, idle first": replace(soon, idle_first=True),
        "KEDA's defaults": Scaling(),
        "10 messages, at once": hasty,
        "1 message, at once": replace(hasty, target=1, lag_threshold=1),
        "100 messages": replace(ours, target=100, per_message=1, formula=False, lag_threshold=100),
        "chart, excludePersistentLag": replace(ours, exclude_persistent_lag=True),
        "HPA, without KEDA": replace(ours, keda=False),
    }


def steady(until_s: float, jobs_per_s: float, every_s: float = 5) -> Iterator[tuple[float, int]]:
    """Jobs at a constant rate."""
    owed = 0.0
    for step in range(int(until_s / every_s)):
        owed += jobs_per_s * every_s
        yield step * every_s, int(owed)
        owed -= int(owed)


def daily(most_jobs_per_s: float, every_s: float = 60) -> Iterator[tuple[float, int]]:
    """A day: nothing at night, most at noon."""
    owed = 0.0
    for step in range(int(24 * HOUR_S / every_s)):
        at = step * every_s
        owed += every_s * most_jobs_per_s * max(0.0, math.sin(2 * math.pi * (at / (24 * HOUR_S) - 0.25)))
        yield at, int(owed)
        owed -= int(owed)


@dataclass(frozen=True)
class Workload:
    """A trace for workers of one kind, and how long it is watched."""

    arrivals: tuple[tuple[float, int], ...]
    workers: Workers
    until_s: float
    step_s: float = 0.5


def workloads() -> dict[str, Workload]:
    """Slow jobs take 2 s of a worker, quick ones a hundredth of it; a model loads for 90 s."""
    slow = Workers()
    quick = Workers(service_s=0.64, jobs_at_once=32)
    long = Workers(service_s=120, jobs_at_once=4, load_s=180)
    near, far = [240.0 * number for number in range(6)], [1200.0 * number for number in range(3)]
    return {
        "slow jobs, steady": Workload(tuple(steady(HOUR_S, 1.2)), slow, 1.5 * HOUR_S),
        "slow jobs, bursts every four minutes": Workload(tuple((at, 300) for at in near), slow, HOUR_S),
        "slow jobs, bursts every twenty minutes": Workload(tuple((at, 300) for at in far), slow, 1.5 * HOUR_S),
        "quick jobs, bursts every four minutes": Workload(tuple((at, 3000) for at in near), quick, HOUR_S, 0.25),
        "jobs of two minutes": Workload(((0.0, 80), (1200.0, 80)), long, 2 * HOUR_S),
        "a day": Workload(tuple(daily(2.0)), slow, 26 * HOUR_S, 2.0),
    }


def compare(only: Iterable[str] = ()) -> tuple[dict[str, Any], dict[str, dict[str, list[tuple[float, int, int]]]]]:
    """Figures and samples of every workload with every setting."""
    wanted = set(only)
    figures: dict[str, Any] = {}
    samples: dict[str, dict[str, list[tuple[float, int, int]]]] = {}
    for name, load in workloads().items():
        if wanted and name not in wanted:
            continue
        runs = {
            setting: simulate(load.arrivals, load.workers, scaling, until_s=load.until_s, step_s=load.step_s)
            for setting, scaling in contestants(load.workers).items()
        }
        samples[name] = {setting: run.samples for setting, run in runs.items()}
        figures[name] = {
            "workers": asdict(load.workers),
            "seconds_per_job": load.workers.seconds_per_job,
            "jobs": sum(count for _, count in load.arrivals),
            "settings": {setting: run.figures() for setting, run in runs.items()},
        }
    return figures, samples


# A recorded trace.


def replay(trace: dict[str, Any]) -> Run:
    """The simulation of a trace that `benchmarks/autoscale_record.py` wrote."""
    scaling = dict(trace["scaling"])
    for direction in ("up", "down"):
        told = scaling[direction]
        policies = tuple(Policy(**policy) for policy in told["policies"])
        scaling[direction] = Behaviour(told["window_s"], policies)
    arrivals = [(at, count) for at, count in trace["arrivals"]]
    return simulate(
        arrivals, Workers(**trace["workers"]), Scaling(**scaling), until_s=trace["samples"][-1][0], step_s=0.25
    )


def replicas_at(samples: Sequence[Sequence[float]], times: Iterable[float]) -> list[float]:
    """The number of replicas at each of ``times``, which are in order."""
    found, index = [], 0
    for at in times:
        while index + 1 < len(samples) and samples[index + 1][0] <= at:
            index += 1
        found.append(samples[index][1])
    return found


def drained_at(samples: Sequence[Sequence[float]], since_s: float, before_s: float = NOTHING_S) -> float:
    """Seconds from ``since_s`` to the first sample without lag after some; infinite where there is none."""
    has_lag = False
    for at, _, lag in samples:
        if since_s <= at < before_s:
            if has_lag and not lag:
                return at - since_s
            has_lag = has_lag or lag > 0
    return NOTHING_S


def agreement(trace: dict[str, Any], run: Run) -> dict[str, float]:
    """How far a simulation is from the trace: replicas over time as a share of its area, and each burst's drain."""
    times = [float(second) for second in range(int(trace["samples"][-1][0]))]
    real, ours = replicas_at(trace["samples"], times), replicas_at(run.samples, times)
    off = sum(abs(one - other) for one, other in zip(real, ours, strict=True)) / sum(real)
    bursts = [at for at, _ in trace["arrivals"]]
    found = {"replicas_off": off}
    for number, (at, until) in enumerate(zip(bursts, [*bursts[1:], NOTHING_S], strict=True), 1):
        measured, simulated = drained_at(trace["samples"], at, until), drained_at(run.samples, at, until)
        found[f"drain_{number}_s"] = round(measured, 1)
        found[f"drain_{number}_off"] = abs(simulated - measured) / measured
    return {name: round(value, 3) for name, value in found.items()}


def main() -> int:
    """Compare, or record; write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="FILE", help="record a real trace into FILE, and simulate it")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORKLOAD", help="some of the workloads")
    add_output(parser, "autoscale.json")
    options = parser.parse_args()
    if options.record:
        from benchmarks.autoscale_record import record

        trace = record()
        write_text(options.record, json.dumps(trace) + "\n")
        print(json.dumps(agreement(trace, replay(trace)), indent=1))
        return 0
    figures, samples = compare(options.only)
    report = {"command": "python benchmarks/autoscale.py", "is_simulated": True, "workloads": figures}
    write_text(options.output, json.dumps(report, indent=1) + "\n")
    plotted = ("chart", "KEDA's defaults", "10 messages, at once", "100 messages")
    panels = {
        f"{name}: {what}": {
            setting: [(at / 60, float(sample[index])) for at, *sample in points]
            for setting, points in runs.items()
            if setting in plotted
        }
        for name, runs in samples.items()
        if "bursts" in name
        for index, what in enumerate(("workers", "jobs that wait"))
    }
    if panels:
        draw_steps(panels, "minutes; simulated", options.output.with_suffix(".svg"))
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
