"""The pipeline alone, its engine echoing: CPU a job, jobs a second, added latency and memory, on Apache Kafka.

    python benchmarks/pipeline.py [--jobs 20000] [--more-jobs 180000] [--before TREE]... [--faststream-python PATH]

Beside it, by turns, loops that only take a job, check it and produce two records. Rates and CPU are seen from outside:
from the first result in the topic to the last, and what the kernel charged to the process in between. Three runs
each, in turn; the figures are medians. ``--faststream-python`` is an interpreter that has ``faststream[kafka]``.
``--before`` is another checkout of this repository, whose worker of the same mode runs behind each of this one's: the
report has the ratio of CPU a job of each such pair. ``--workers`` names the workers that are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import msgpack
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from parts import KafkaNode, create_topic, unique_name, worker_process

from benchmarks.machine import describe_machine
from benchmarks.output import add_output, write_text
from nanovllm.demo.child_process import LocalProcess

PARTITIONS = 4
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Topics:
    jobs: str
    results: str
    metrics: str
    dead_letters: str


@dataclass
class Bench:
    brokers: str
    directory: Path
    faststream_python: str | None
    before: Sequence[Path] = ()

    async def topics(self) -> Topics:
        base = unique_name("bench")
        topics = Topics(*(f"{base}.{name}" for name in ("jobs", "results", "metrics", "dead")))
        await create_topic(self.brokers, *vars(topics).values(), partitions=PARTITIONS)
        return topics

    def contender(self, name: str, topics: Topics) -> LocalProcess:
        group = unique_name("group")
        if name in ("aiokafka", "faststream"):
            python = self.faststream_python if name == "faststream" else sys.executable
            names = (topics.jobs, topics.results, topics.metrics)
            command = [str(python), str(ROOT / "benchmarks" / "plain_loops.py"), name, self.brokers, group, *names]
            return LocalProcess(name, command, self.directory / f"{name}.log")
        settings = {
            "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": self.brokers,
            "NANOVLLM_KAFKA__GROUP_ID": group,
            "NANOVLLM_ENGINE__BACKEND": "echo",
            "NANOVLLM_DELIVERY": "exactly_once" if "exactly_once" in name else "at_least_once",
            "NANOVLLM_LOG_LEVEL": "warning",
            **{f"NANOVLLM_TOPICS__{key.upper()}": value for key, value in vars(topics).items()},
        }
        tree = next((tree for tree in self.before if name.endswith(_of(tree))), None)
        if tree is None:
            return worker_process(self.directory, settings=settings, name=name)
        settings |= {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
        return worker_process(self.directory, settings=settings, name=name, program=_program_of(tree))

    async def produce(self, topics: Topics, count: int, *, packed: bool, per_second: float = 0.0) -> None:
        async with AIOKafkaProducer(bootstrap_servers=self.brokers, linger_ms=5) as producer:
            sent: list[Any] = []
            began = time.monotonic()
            for number in range(count):
                job = {"version": 1, "job_id": f"job-{number:07d}", "prompt": f"What is the total of receipt {number}?"}
                value = msgpack.packb(job) if packed else json.dumps(job).encode()
                sent.append(await producer.send(topics.jobs, value, partition=number % PARTITIONS))
                if per_second:
                    await asyncio.sleep(max(0.0, began + number / per_second - time.monotonic()))
                if len(sent) >= 5_000:
                    await asyncio.gather(*sent)
                    sent.clear()
            await asyncio.gather(*sent)

    @asynccontextmanager
    async def watching(self, topics: Topics) -> AsyncIterator[AIOKafkaConsumer]:
        """A reader of the results from the beginning; it sees committed ones only."""
        async with AIOKafkaConsumer(
            topics.results,
            bootstrap_servers=self.brokers,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
        ) as consumer:
            yield consumer

    async def rate(self, name: str, jobs: int) -> dict[str, float]:
        """Jobs a second and CPU milliseconds a job of one contender on ``jobs`` that wait for it."""
        topics = await self.topics()
        await self.produce(topics, jobs, packed="msgpack" in name)
        process = self.contender(name, topics)
        process.start()
        try:
            async with self.watching(topics) as consumer:
                first = await self._read(process, consumer, 1)
                cpu, began = _cpu_s(process), time.monotonic()
                last = first + await self._read(process, consumer, jobs - first)
                took_s, cpu_s = time.monotonic() - began, _cpu_s(process) - cpu
            return {"jobs_per_s": (last - first) / took_s, "cpu_ms_per_job": 1000 * cpu_s / (last - first)}
        finally:
            process.kill()

    async def memory(self, jobs: int, more: int) -> dict[str, float]:
        """Resident memory of one worker after ``jobs`` and after ``more`` on top."""
        topics = await self.topics()
        process = self.contender("worker json", topics)
        process.start()
        try:
            async with self.watching(topics) as consumer:
                await self.produce(topics, jobs, packed=False)
                await self._read(process, consumer, jobs)
                before = _resident_bytes(process)
                await self.produce(topics, more, packed=False)
                await self._read(process, consumer, more)
                after = _resident_bytes(process)
        finally:
            process.kill()
        return {"jobs": jobs, "bytes": before, "jobs_later": jobs + more, "bytes_later": after, "ratio": after / before}

    async def latency(self, name: str, jobs: int, per_second: float) -> dict[str, float]:
        """Milliseconds from a job's timestamp to its result's, at a rate that leaves the worker idle in between."""
        topics = await self.topics()
        process = self.contender(name, topics)
        process.start()
        try:
            await self.produce(topics, 50, packed=False)
            async with self.watching(topics) as consumer:
                await self._read(process, consumer, 50)
                await self.produce(topics, jobs, packed=False, per_second=per_second)
                await self._read(process, consumer, jobs)
            waits = [
                message.timestamp - json.loads(message.value)["source"]["timestamp_ms"]
                for message in await self._results(topics, jobs + 50)
            ][50:]
        finally:
            process.kill()
        ordered = sorted(waits)
        return {
            "jobs": jobs,
            "jobs_per_s": per_second,
            "p50_ms": statistics.median(ordered),
            "p99_ms": ordered[int(0.99 * len(ordered))],
        }

    async def _results(self, topics: Topics, count: int) -> list[Any]:
        async with AIOKafkaConsumer(
            topics.results, bootstrap_servers=self.brokers, auto_offset_reset="earliest"
        ) as consumer:
            records: list[Any] = []
            while len(records) < count:
                for batch in (await consumer.getmany(timeout_ms=500)).values():
                    records += batch
        return sorted(records, key=lambda record: record.timestamp)

    async def _read(self, process: LocalProcess, consumer: AIOKafkaConsumer, count: int) -> int:
        """Read at least ``count`` more results; returns how many."""
        seen = 0
        while seen < count:
            batches = await consumer.getmany(timeout_ms=50)
            seen += sum(len(batch) for batch in batches.values())
            if not process.is_running:
                raise RuntimeError(f"{process.name} ended: {process.tail(20)}")
        return seen


def _of(tree: Path) -> str:
    """What the name of a worker of ``tree`` ends with."""
    return f" of {tree.name}"


def _program_of(tree: Path) -> list[str]:
    """Arguments of Python that run the command line of ``tree``, wherever it is there."""
    script = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["scripts"]["nanovllm"]
    module, _, function = script.partition(":")
    return ["-c", f"from {module} import {function}; {function}()"]


def _cpu_s(process: LocalProcess) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _resident_bytes(process: LocalProcess) -> int:
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_ratios(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """CPU a job of each worker over that of the other tree's worker behind it, turn by turn."""
    found = {}
    for name, after in runs.items():
        for other, before in runs.items():
            if other.startswith(f"{name} of "):
                pairs = zip(after, before, strict=True)
                ratios = [round(one["cpu_ms_per_job"] / two["cpu_ms_per_job"], 3) for one, two in pairs]
                found[other] = {"median": round(statistics.median(ratios), 3), "ratios": ratios}
    return found


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


async def run(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="nanovllm-bench-") as directory:
        async with KafkaNode(Path(directory)) as node:
            trees = [tree.resolve() for tree in options.before]
            bench = Bench(node.bootstrap_servers, Path(directory), options.faststream_python, trees)
            names = [name + tree for name in options.workers for tree in ("", *map(_of, trees))]
            names += ["aiokafka"]
            names += ["faststream"] if options.faststream_python else []
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
            for _ in range(options.repeats):
                for name in names:
                    runs[name].append(await bench.rate(name, options.jobs))
                    print(name, runs[name][-1], flush=True)
            report: dict[str, Any] = {
                "machine": describe_machine(" ".join(["python", "benchmarks/pipeline.py", *sys.argv[1:]])),
                "jobs": options.jobs,
                "repeats": options.repeats,
                "medians": {name: medians(found) for name, found in runs.items()},
                "cpu_ratios": cpu_ratios(runs),
                "runs": runs,
            }
            if options.latency_jobs:
                report["added_latency"] = {
                    name: await bench.latency(name, options.latency_jobs, options.latency_rate)
                    for name in ("worker json", "worker json exactly_once")
                }
            if options.more_jobs:
                report["memory"] = await bench.memory(options.jobs, options.more_jobs)
            return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--more-jobs", type=int, default=180_000, help="0 leaves the memory out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", nargs="+", default=["worker json", "worker msgpack", "worker json exactly_once"])
    parser.add_argument("--before", type=Path, action="append", default=[], help="a checkout of another commit")
    parser.add_argument("--latency-jobs", type=int, default=1_000, help="0 leaves the latency out")
    parser.add_argument("--latency-rate", type=float, default=50.0)
    parser.add_argument("--faststream-python")
    add_output(parser, "pipeline.json")
    options = parser.parse_args()
    report = asyncio.run(run(options))
    write_text(options.output, json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "runs"}, indent=1))


if __name__ == "__main__":
    main()
