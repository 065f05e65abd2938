"""How a runner talks: arguments in, one JSON line when it is ready, then one for each workload file named on stdin.

A runner is a process in its engine's own environment, so this file needs nothing but Python. It stays loaded between
turns and sleeps while the others have theirs. What libraries print goes to stderr, and the parent keeps it as a log.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Answers = list[list[int]] | None  # token ids, in the order of the requests; None where an engine does not tell


class Engine(Protocol):
    """A loaded model."""

    versions: dict[str, str]  # what ran, for the report

    def run(self, workload: dict[str, Any]) -> tuple[Answers, dict[str, Any]]:
        """Answer all requests of a workload (workloads.py); and whatever else the engine can tell."""
        ...


def read_arguments() -> argparse.Namespace:
    """What every runner takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="directory of a Hugging Face checkpoint")
    parser.add_argument("--precision", choices=["fp32", "bf16", "int8"], required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="sequences at once")
    parser.add_argument("--kinds", default="text", help="kinds of workload to come, by commas")
    parser.add_argument("--work", required=True, help="directory for exported or converted weights, kept between runs")
    parser.add_argument("--own-defaults", action="store_true", help="as the engine runs where nothing is set")
    parser.add_argument("--kv-cache-bytes", type=int, help="instead of the engine's own default (nanovllm alone)")
    parser.add_argument("--clocks", action="store_true", help="time linear layers too (nanovllm alone)")
    return parser.parse_args()


def serve(load: Callable[[argparse.Namespace], Engine]) -> None:
    """Load the engine and answer until stdin ends. A workload that fails is answered with its error."""
    args = read_arguments()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = time.perf_counter()
    engine = load(args)
    print(json.dumps({"ready": True, "load_seconds": time.perf_counter() - started, **engine.versions}), file=replies)
    for line in sys.stdin:
        with open(line.strip(), encoding="utf-8") as file:
            workload = json.load(file)
        print(json.dumps(time_one(engine, workload)), file=replies)


def time_one(engine: Engine, workload: dict[str, Any]) -> dict[str, Any]:
    """Seconds by the clock and of CPUs (children too), the answers, and what the engine adds."""
    started, cpu_started = time.perf_counter(), cpu_seconds()
    try:
        answers, details = engine.run(workload)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    taken = {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu_started}
    return {**taken, "answers": answers, **details}


def cpu_seconds() -> float:
    """CPU time of this process, of its children that have ended, and of processes below it that run."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) + _running_below()


def _running_below() -> float:
    parents, seconds = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()  # a name may hold spaces
        except OSError:  # ended meanwhile
            continue
        process = int(path.parent.name)
        parents[process] = int(fields[1])
        seconds[process] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # with its own ended children
    below = {os.getpid()}
    while found := {process for process, parent in parents.items() if parent in below} - below:
        below |= found
    return sum(seconds[process] for process in below - {os.getpid()})
