"""Images that tools/build_image.py has built: bytes of their layers, and the start of a worker in a container.

    PYTHONPATH=. python benchmarks/image.py [--folder build/image] [--runs 5] [--variants cpu remote]

A start is what lies between the exec of crun and the first answer of /readyz, on an embedded broker: seconds, and CPU
seconds of all processes of the container. ``cpu`` loads the shipped checkpoint, ``remote`` echoes. Seconds are worth
something on a quiet machine only; the load at the start is written beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from machine import describe_machine
from output import add_output, write_text

from nanovllm.demo.broker import EmbeddedBroker
from nanovllm.demo.child_process import LocalProcess, free_port, read_loopback
from nanovllm.settings.worker import Settings
from tools.build_image import BASE, FOLDER, Storage, largest_packages, name_of
from tools.run_image import Container

TIMEOUT_S = 300.0
SETTINGS: Mapping[str, Mapping[str, str]] = {"cpu": {}, "remote": {"NANOVLLM_ENGINE__BACKEND": "echo"}}


def cpu_seconds(pid: int) -> float:
    """CPU seconds of all processes in the PID namespace of ``pid``, those that have ended among them."""
    namespace, ticks = os.stat(f"/proc/{pid}/ns/pid").st_ino, 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.stat(process / "ns" / "pid").st_ino == namespace:
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                ticks += sum(int(field) for field in fields[11:15])
        except OSError:
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def start_once(storage: Storage, variant: str, brokers: str, directory: Path) -> dict[str, float]:
    """One start of a worker, until it is ready; RuntimeError where it ends or takes ``TIMEOUT_S``."""
    port = free_port()
    environment = {
        "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": brokers,
        "NANOVLLM_HTTP__HOST": "127.0.0.1",
        "NANOVLLM_HTTP__PORT": str(port),
        "OMP_NUM_THREADS": "2",
        **SETTINGS[variant],
    }
    container = Container(storage, name_of(variant), directory, environment=environment)
    process = LocalProcess(variant, container.command, directory / f"{container.name}.log")
    began = time.monotonic()
    process.start()
    try:
        while not is_ready(port):
            if not process.is_running or time.monotonic() > began + TIMEOUT_S:
                raise RuntimeError(f"the worker of {variant} is not ready: {process.tail(20)}")
            time.sleep(0.02)
        return {"seconds": time.monotonic() - began, "cpu_seconds": cpu_seconds(container.pid)}
    finally:
        process.stop(grace_s=60)
        container.remove()


def is_ready(port: int) -> bool:
    """Whether /readyz answers 200."""
    try:
        return bool(read_loopback(f"http://127.0.0.1:{port}/readyz"))
    except OSError:
        return False


def starts(storage: Storage, variant: str, runs: int) -> dict[str, Any]:
    """The median of ``runs`` starts, and each; a first one, which reads the files from the disk, is not among them."""
    broker = EmbeddedBroker()
    asyncio.run(broker.start())
    try:
        asyncio.run(create_topics(broker.bootstrap_servers))
        with tempfile.TemporaryDirectory() as directory:
            first, *found = [
                start_once(storage, variant, broker.bootstrap_servers, Path(directory)) for _ in range(runs + 1)
            ]
    finally:
        broker.stop()
    medians = {name: round(statistics.median(run[name] for run in found), 3) for name in found[0]}
    return {**medians, "first": first, "runs": found}


async def create_topics(brokers: str) -> None:
    """The topics of a worker with the settings' own names."""
    topics = Settings().topics
    admin = AIOKafkaAdminClient(bootstrap_servers=brokers)
    await admin.start()
    try:
        names = (topics.jobs, topics.results, topics.metrics, topics.dead_letters)
        await admin.create_topics([NewTopic(name, 4, 1) for name in names])
    finally:
        await admin.close()


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--driver", default="vfs")
    parser.add_argument("--variants", nargs="+", default=["cpu", "remote"])
    parser.add_argument("--runs", type=int, default=5)
    add_output(parser, "image.json")
    asked = parser.parse_args()
    storage = Storage(asked.folder, asked.driver)
    figures: dict[str, Any] = {
        "machine": describe_machine(f"python benchmarks/image.py --runs {asked.runs}"),
        "base": {"made_by": "debootstrap", "layers": [asdict(layer) for layer in storage.layers(BASE)]},
        "images": {},
    }
    for variant in asked.variants:
        image = name_of(variant)
        figures["images"][variant] = {
            "layers": [asdict(layer) for layer in storage.layers(image)],
            "largest": largest_packages(storage.root(image)),
            **({"start": starts(storage, variant, asked.runs)} if variant in SETTINGS and asked.runs else {}),
        }
    write_text(asked.output, json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
