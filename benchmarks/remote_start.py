"""The start of a worker in front of servers, installed with the extra `remote` alone: from exec to its first poll.

    python benchmarks/remote_start.py [--runs 5] [--realtime]

Makes an environment in build/remote with `pip install '.[remote]'`, checks that torch and transformers are not in it,
and starts workers from it against Apache Kafka, in front of the tests' server of OpenAI's protocol. Seconds end where
the worker consumes, less those that it took to join its group; CPU seconds and peak resident memory are of the worker's
process at that moment, those of its decoder processes beside them. A first start, which reads files from the disk, is
not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import psutil
from openai_server import OpenAIServer
from parts import KafkaNode, create_topic, eventually, unique_name

from benchmarks.output import add_output, write_text
from nanovllm.demo.child_process import LocalProcess

CONSUMING = re.compile(r"^(\S+ \S+) INFO nanovllm\.worker: consuming .* which took ([\d.]+) s to join", re.MULTILINE)
MAX_SECONDS, MAX_MIB = 2.0, 150.0
REALTIME = ("chrt", "--fifo", "1")


@dataclass(frozen=True)
class Start:
    """``seconds`` from exec to the first poll without ``joining_s``; memory in MiB."""

    seconds: float
    joining_s: float
    cpu_s: float
    peak_mib: float
    decoders: int
    decoders_cpu_s: float
    decoders_mib: float


def install(directory: Path) -> Path:
    """The interpreter of an environment with this package and its extra `remote`."""
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, f"{ROOT}[remote]"], check=True)
    subprocess.run([*pip, "--force-reinstall", "--no-deps", str(ROOT)], check=True)  # one version, other sources
    for name in ("torch", "transformers", "tokenizers"):
        if subprocess.run([str(python), "-c", f"import {name}"], capture_output=True, check=False).returncode == 0:
            raise SystemExit(f"{name} is installed in {directory}: remove that folder")
    return python


def variables(brokers: str, topics: dict[str, str], server: OpenAIServer) -> dict[str, str]:
    """The environment of a worker; nothing of this process's own Python reaches it."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {
        **inherited,
        "PYTHONUNBUFFERED": "1",
        "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": brokers,
        "NANOVLLM_KAFKA__GROUP_ID": unique_name("group"),
        "NANOVLLM_ENGINE__BACKEND": "openai",
        "NANOVLLM_REMOTE__ENDPOINTS": server.url,
        "NANOVLLM_S3__ALLOW": "s3://images",
        "NANOVLLM_HTTP__HOST": "127.0.0.1",
        "NANOVLLM_HTTP__PORT": "0",
        **{f"NANOVLLM_TOPICS__{name.upper()}": topic for name, topic in topics.items()},
    }


def peak_memory_kib(pid: int) -> int:
    """The most resident memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[0])


async def start_once(command: list[str], environment: dict[str, str], directory: Path) -> Start:
    """One worker, started, measured and stopped."""
    log = directory / f"{unique_name('worker')}.log"
    worker = LocalProcess("worker", [*command, "-m", "nanovllm.cli.main", "worker"], log, env=environment)
    begun = time.time()
    worker.start()
    try:
        await eventually(lambda: not worker.is_running or CONSUMING.search(log.read_text()))
        found = CONSUMING.search(log.read_text())
        if found is None or worker.pid is None:
            raise SystemExit(f"the worker did not start:\n{worker.tail(30)}")
        process = psutil.Process(worker.pid)
        cpu, children, peak_kib = process.cpu_times(), process.children(), peak_memory_kib(worker.pid)
        times = [child.cpu_times() for child in children]
        resident = sum(child.memory_info().rss for child in children)
    finally:
        worker.stop()
    if worker.exit_code != 0:
        raise SystemExit(f"the worker ended with {worker.exit_code}:\n{worker.tail(30)}")
    consuming, joining_s = datetime.fromisoformat(found[1].replace(",", ".")).timestamp(), float(found[2])
    return Start(
        seconds=round(consuming - begun - joining_s, 3),
        joining_s=joining_s,
        cpu_s=round(cpu.user + cpu.system, 2),
        peak_mib=round(peak_kib / 1024, 1),
        decoders=len(children),
        decoders_cpu_s=round(sum(one.user + one.system for one in times), 2),
        decoders_mib=round(resident / 2**20, 1),
    )


async def measure(command: list[str], runs: int) -> list[Start]:
    """``runs`` starts one after another, on an Apache Kafka of their own."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        async with KafkaNode(directory / "kafka") as node, OpenAIServer() as server:
            base = unique_name("start")
            topics = {name: f"{base}.{name}" for name in ("jobs", "results", "metrics", "dead_letters")}
            await create_topic(node.bootstrap_servers, *topics.values())
            environment = variables(node.bootstrap_servers, topics, server)
            starts = [await start_once(command, environment, directory) for _ in range(runs + 1)]
    return starts[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--realtime", action="store_true", help="let nothing else on this machine delay the workers (Linux, root)"
    )
    add_output(parser, "remote-start.json")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    command = [*(REALTIME if options.realtime else ()), str(install(ROOT / "build" / "remote"))]
    starts = asyncio.run(measure(command, options.runs))
    figures: dict[str, Any] = {
        name: statistics.median(getattr(start, name) for start in starts) for name in Start.__dataclass_fields__
    }
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "load_average_at_start": round(load, 2)}
    machine["is_realtime"] = options.realtime
    asked = f"python benchmarks/remote_start.py --runs {options.runs}" + " --realtime" * options.realtime
    written = {"command": asked, "machine": machine, **figures, "runs": [asdict(start) for start in starts]}
    write_text(options.output, json.dumps(written, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    return 0 if figures["seconds"] <= MAX_SECONDS and figures["peak_mib"] <= MAX_MIB else 1


if __name__ == "__main__":
    sys.exit(main())
