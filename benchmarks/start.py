"""The start of an engine and of a worker: seconds from exec to the first token, and the phases of this tree's.

    python benchmarks/start.py [--checkpoints smollm 0.6b] [--runs 3] [--before TREE]

Each run is a process of its own: ``LLM(...)`` with a prompt of one token's answer, and ``nanovllm worker`` on an
embedded broker, whose only job waits in its topic. ``TREE`` is another checkout, which runs by turns with this one; the
interpreter and what is installed in it are the same. A first run of each, which reads files from the disk and compiles
kernels, is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from checkpoints import checkpoint
from machine import describe_machine
from output import add_output, write_text

from nanovllm.demo.broker import EmbeddedBroker
from nanovllm.demo.child_process import LocalProcess

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Hello, my name is"
FROM_PYTHON = """
from nanovllm import LLM, SamplingParams
llm = LLM({directory!r})
llm.generate([{prompt!r}], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
print("first token", flush=True)
try:
    from nanovllm.start_phases import START
    print(START, flush=True)
except ImportError:
    pass
"""
PHASES = re.compile(r"([a-z][a-z ]*) ([\d.]+) s(?:, |\)|$)")
STARTED = re.compile(r"start: [\d.]+ s since the process began \((.*)\)")
TOPICS = ("jobs", "results", "metrics", "dead_letters", "in_flight")
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Start:
    """Seconds from exec to the first token, and of each phase where the tree tells them."""

    seconds: float
    phases: dict[str, float]


def phases_in(text: str) -> dict[str, float]:
    """The seconds of each phase as a start tells them."""
    return {name: float(seconds) for name, seconds in PHASES.findall(text)}


def environment(tree: Path, **variables: str) -> dict[str, str]:
    """Variables for a process of ``tree``, with threads that sleep while they wait, as a worker sets them."""
    threads = {"GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    # A worker refuses what is no setting of its own, as the benchmarks' variables are.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("NANOVLLM_")}
    return {**inherited, **threads, "PYTHONPATH": str(tree), "PYTHONUNBUFFERED": "1", **variables}


def start_in_python(tree: Path, directory: Path) -> Start:
    """One process that loads the checkpoint by ``LLM`` and takes a token."""
    script = FROM_PYTHON.format(directory=str(directory), prompt=PROMPT)
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script],
        env=environment(tree),
        cwd="/",
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.monotonic() - began
        told = process.stdout.read()
    if process.returncode or line != "first token\n":
        raise SystemExit(f"{tree} did not answer: exit code {process.returncode}")
    return Start(round(seconds, 3), phases_in(told.strip()))


async def start_worker(tree: Path, directory: Path, brokers: str, log: Path) -> Start:
    """One worker process that answers the one job of its topic."""
    topics = {
        name: f"{name}-{uuid4().hex[:10]}" for name in ("jobs", "results", "metrics", "dead_letters", "in_flight")
    }
    admin = AIOKafkaAdminClient(bootstrap_servers=brokers)
    await admin.start()
    await admin.create_topics([NewTopic(name, 1, 1) for name in topics.values()])
    await admin.close()
    job = {"job_id": "first", "prompt": PROMPT, "sampling": {"temperature": 0.0, "max_tokens": 1}}
    async with AIOKafkaProducer(bootstrap_servers=brokers) as producer:
        await producer.send_and_wait(topics["jobs"], json.dumps(job).encode())
    variables = {
        "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": brokers,
        "NANOVLLM_KAFKA__GROUP_ID": topics["jobs"],
        "NANOVLLM_ENGINE__MODEL": str(directory),
        "NANOVLLM_HTTP__HOST": "127.0.0.1",
        "NANOVLLM_HTTP__PORT": "0",
        **{f"NANOVLLM_TOPICS__{name.upper()}": topic for name, topic in topics.items()},
    }
    async with AIOKafkaConsumer(
        topics["results"], bootstrap_servers=brokers, auto_offset_reset="earliest", fetch_max_wait_ms=20
    ) as results:
        # -P: without the working directory, which is a checkout too, before PYTHONPATH.
        command = [sys.executable, "-P", "-m", "nanovllm.cli.main", "worker"]
        worker = LocalProcess("worker", command, log, env=environment(tree, **variables))
        began = time.monotonic()
        worker.start()
        try:
            await asyncio.wait_for(results.getone(), TIMEOUT_S)
            seconds = time.monotonic() - began
        except TimeoutError:
            raise SystemExit(f"{tree} did not answer:\n{worker.tail(30)}") from None
        finally:
            worker.stop()
    told = STARTED.findall(worker.tail(1_000))  # the log of earlier runs stands before
    return Start(round(seconds, 3), phases_in(told[-1]) if told else {})


async def measure(trees: dict[str, Path], directory: Path, runs: int) -> dict[str, dict[str, list[Start]]]:
    """The starts of each tree by turns, in Python and as a worker."""
    found: dict[str, dict[str, list[Start]]] = {tree: {"python": [], "worker": []} for tree in trees}
    with tempfile.TemporaryDirectory() as folder:
        broker = EmbeddedBroker(Path(folder))
        await broker.start()
        try:
            for run in range(runs + 1):
                for name, tree in trees.items():
                    starts = {
                        "python": start_in_python(tree, directory),
                        "worker": await start_worker(tree, directory, broker.bootstrap_servers, Path(folder, "log")),
                    }
                    for kind, start in starts.items() if run else ():
                        found[name][kind].append(start)
                        print(f"{directory.name} {kind} {name}: {start.seconds:.2f} s", file=sys.stderr)
        finally:
            broker.stop()
    return found


def summary(starts: list[Start]) -> dict[str, object]:
    """Medians of the seconds and of each phase, and all starts."""
    phases = {
        name: round(statistics.median(start.phases.get(name, 0.0) for start in starts), 3) for name in starts[0].phases
    }
    seconds = statistics.median(start.seconds for start in starts)
    return {"seconds": seconds, "phases": phases, "runs": [asdict(start) for start in starts]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", nargs="+", default=["smollm", "0.6b"])
    parser.add_argument("--checkpoint-root", type=Path, default=ROOT / "build" / "checkpoints")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--before", type=Path, help="another checkout, by turns with this one")
    add_output(parser, "start.json")
    options = parser.parse_args()
    trees = {"after": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    command = f"python benchmarks/start.py --runs {options.runs}" + " --before TREE" * bool(options.before)
    written: dict[str, object] = {"machine": describe_machine(command)}
    for name in options.checkpoints:
        found = asyncio.run(measure(trees, checkpoint(name, options.checkpoint_root), options.runs))
        written[name] = {
            tree: {kind: summary(starts) for kind, starts in kinds.items()} for tree, kinds in found.items()
        }
        write_text(options.output, json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
