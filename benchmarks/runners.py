"""Engines as processes that stay loaded: how they are started, asked and measured."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import busy_seconds
from benchmarks.workloads import Workload

HERE = Path(__file__).resolve().parent
SPINS = "20000"
"""``GOMP_SPINCOUNT`` of every engine: threads that wait spin for some microseconds, then sleep."""


class RunnerFailed(Exception):
    """A runner ended or answered with an error; says where its log is."""


@dataclass(frozen=True)
class Launch:
    """How to start a runner: its column's name, interpreter and script under ``peers/``, and what it is told."""

    name: str
    python: str
    script: str
    model: Path
    precision: str
    kinds: frozenset[str]
    threads: int
    batch: int
    work: Path
    flags: tuple[str, ...] = ()
    tree: Path | None = None  # a checkout whose nanovllm the runner imports

    def command(self) -> list[str]:
        """The runner's command line."""
        options = {
            "--model": self.model,
            "--precision": self.precision,
            "--threads": self.threads,
            "--batch": self.batch,
            "--kinds": ",".join(sorted(self.kinds)),
            "--work": self.work,
        }
        words = [str(word) for option in options.items() for word in option]
        return [self.python, str(HERE / "peers" / self.script), *words, *self.flags]

    def environment(self) -> dict[str, str]:
        """The runner's environment: no net, and waiting threads that sleep soon; threads unset for own defaults."""
        found = {**os.environ, "HF_HUB_OFFLINE": "1"}
        found.pop("OMP_NUM_THREADS", None)
        if "--own-defaults" not in self.flags:
            found |= {"OMP_NUM_THREADS": str(self.threads), "GOMP_SPINCOUNT": SPINS, "OMP_WAIT_POLICY": "PASSIVE"}
        if self.tree is not None:
            found["PYTHONPATH"] = str(self.tree)
        return found


@dataclass
class Runner:
    """An engine's process."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    versions: dict[str, Any] = field(default_factory=dict)

    def ask(self, workload: Workload, path: Path) -> dict[str, Any]:
        """Let it answer a workload; adds the share of all CPUs that others used meanwhile. Raises RunnerFailed."""
        assert self.process.stdin is not None
        started, busy = time.perf_counter(), busy_seconds()
        try:
            print(workload.write(path), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise RunnerFailed(f"{self.name} has ended; see {self.log}") from None
        reply = self.read()
        others = busy_seconds() - busy - reply["cpu_seconds"]
        reply["others_cpu_share"] = round(max(0.0, others) / (time.perf_counter() - started) / (os.cpu_count() or 1), 3)
        return reply

    def read(self) -> dict[str, Any]:
        """Its next line. Raises RunnerFailed."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        reply: dict[str, Any] = json.loads(line) if line else {"error": f"it ended with {self.process.wait()}"}
        if "error" in reply:
            raise RunnerFailed(f"{self.name}: {reply['error']}; its log is {self.log}")
        return reply


@contextmanager
def started(launch: Launch) -> Iterator[Runner]:
    """A runner that has loaded the checkpoint; it ends with the block. Raises RunnerFailed."""
    log = launch.work / f"{launch.name}-{launch.model.name}-{launch.precision}.log"
    command = launch.command()
    with log.open("w") as stderr:
        print(shlex.join(command), file=stderr, flush=True)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=launch.environment(),
        )
    try:
        runner = Runner(launch.name, process, log)
        runner.versions = runner.read()
        print(f"{launch.name} loaded in {runner.versions['load_seconds']:.0f} s", flush=True)
        yield runner
    finally:
        process.kill()
        process.wait()


def measure(runner: Runner, workload: Workload, other: Workload, path: Path) -> dict[str, Any]:
    """One turn, with ``tokens_per_second``; of ``decode`` beyond what prompts of ``other`` take that answer one token.

    Raises RunnerFailed.
    """
    reply = runner.ask(workload, path)
    tokens = sum(request.max_tokens for request in workload.requests)
    if reply["answers"] is not None:
        tokens = sum(len(answer) for answer in reply["answers"])
    reply["useful_tokens"] = tokens
    if "tokens_per_second" in reply:  # an engine whose own program measures
        return reply
    seconds = reply["seconds"]
    if workload.kind == "decode":
        short = replace(other, requests=tuple(replace(request, max_tokens=1) for request in other.requests))
        first = runner.ask(short, path)
        reply["prefill_seconds"] = first["seconds"]
        reply["others_cpu_share"] = max(reply["others_cpu_share"], first["others_cpu_share"])
        tokens -= len(workload.requests)
        seconds -= first["seconds"]
    reply["tokens_per_second"] = tokens / seconds
    return reply
