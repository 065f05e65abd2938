"""Ten thousand bad messages in a row: what they cost the jobs beside them and the jobs behind them, on Apache Kafka.

    python benchmarks/poison.py [--bad 10000] [--behind 2000] [--runs 5]

Two questions, asked by turns, the engine echoing. **Beside**: good jobs arrive steadily on three partitions, once
alone and once while the bad ones come, all at once, on the fourth; the latency is from just before a job is sent until
the broker has its result (the topics stamp records when they are appended), over the jobs that came while bad ones were
worked off. **Behind**: good jobs wait behind the bad ones on one partition. How fast the bad ones pass, from the first
dead letter to the first answer behind them, beside a loop that only takes a record, parses it and sends one on; and how
fast the good ones are answered then, beside the same good ones with nothing before them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from parts import KafkaNode, create_topic, unique_name, worker_process

from benchmarks.output import add_output, write_text
from nanovllm.demo.child_process import LocalProcess

PARTITIONS = 4
GOOD_PER_S = 50
BAD_AFTER_S = 1.0
BAD = b'{"prompt": "a job that ends in the middle of'


async def make_topics(brokers: str) -> dict[str, str]:
    base = unique_name("poison")
    topics = {name: f"{base}.{name}" for name in ("jobs", "results", "metrics", "dead_letters")}
    settings = {"message.timestamp.type": "LogAppendTime"}
    await create_topic(brokers, *topics.values(), partitions=PARTITIONS, settings=settings)
    return topics


def worker(brokers: str, topics: dict[str, str], directory: Path) -> LocalProcess:
    settings = {
        "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": brokers,
        "NANOVLLM_KAFKA__GROUP_ID": unique_name("group"),
        "NANOVLLM_ENGINE__BACKEND": "echo",
        "NANOVLLM_LOG_LEVEL": "error",
        **{f"NANOVLLM_TOPICS__{name.upper()}": topic for name, topic in topics.items()},
    }
    return worker_process(directory, settings=settings, name=unique_name("worker"))


def plain_loop(brokers: str, topics: dict[str, str], directory: Path) -> LocalProcess:
    names = [topics["jobs"], topics["results"], topics["dead_letters"]]
    command = [sys.executable, __file__, "--plain-loop", brokers, unique_name("group"), *names]
    return LocalProcess("plain", command, directory / f"{unique_name('plain')}.log")


async def loop_plainly(brokers: str, group: str, jobs: str, results: str, dead: str) -> None:
    options: dict[str, Any] = {"group_id": group, "enable_auto_commit": False, "auto_offset_reset": "earliest"}
    consumer = AIOKafkaConsumer(jobs, bootstrap_servers=brokers, **options)
    producer = AIOKafkaProducer(bootstrap_servers=brokers, acks="all", enable_idempotence=True, linger_ms=5)
    async with consumer, producer:
        while True:
            sent = []
            for records in (await consumer.getmany(timeout_ms=250, max_records=500)).values():
                for record in records:
                    try:
                        job = json.loads(record.value)
                        sent.append(await producer.send(results, record.value, key=job["job_id"].encode()))
                    except ValueError:
                        sent.append(await producer.send(dead, record.value))
            await asyncio.gather(*sent)
            if sent:
                await consumer.commit()


def good(name: str) -> bytes:
    return json.dumps({"version": 1, "job_id": name, "prompt": "What is the total of this receipt?"}).encode()


async def send_all(producer: AIOKafkaProducer, topic: str, values: list[bytes], partition: int) -> None:
    sent = [await producer.send(topic, value, partition=partition) for value in values]
    await asyncio.gather(*sent)


def reader(brokers: str, *topics: str) -> AIOKafkaConsumer:
    return AIOKafkaConsumer(*topics, bootstrap_servers=brokers, auto_offset_reset="earliest")


async def read_until(consumer: AIOKafkaConsumer, count: int, timeout_s: float = 180.0) -> list[Any]:
    records: list[Any] = []
    async with asyncio.timeout(timeout_s):
        while len(records) < count:
            for batch in (await consumer.getmany(timeout_ms=100)).values():
                records += batch
    return records


async def latency_beside(brokers: str, directory: Path, bad: int, seconds: float) -> dict[str, float]:
    """Milliseconds of good jobs on three partitions, with ``bad`` messages on the fourth."""
    topics = await make_topics(brokers)
    process = worker(brokers, topics, directory)
    process.start()
    try:
        async with (
            AIOKafkaProducer(bootstrap_servers=brokers, max_batch_size=2**20) as producer,
            reader(brokers, topics["results"]) as results,
        ):
            warm_up = [good(f"warm-{number}") for number in range(50)]
            await send_all(producer, topics["jobs"], warm_up, 1)
            await read_until(results, len(warm_up))
            # Filled beforehand: this process must not be busy with the bad ones while it times the good ones.
            batch = producer.create_batch()
            for _ in range(bad):
                batch.append(timestamp=None, key=None, value=BAD)
            flood: asyncio.Future[Any] | None = None
            sent_ms: dict[bytes, float] = {}
            began = time.monotonic()
            for number in range(int(GOOD_PER_S * seconds)):
                if bad and flood is None and time.monotonic() - began >= BAD_AFTER_S:
                    flood = await producer.send_batch(batch, topics["jobs"], partition=0)
                name = f"good-{number}"
                sent_ms[name.encode()] = time.time() * 1000
                await producer.send(topics["jobs"], good(name), partition=1 + number % 3)
                await asyncio.sleep(max(0.0, began + (number + 1) / GOOD_PER_S - time.monotonic()))
            answers = {record.key: record.timestamp for record in await read_until(results, len(sent_ms))}
        first_ms, last_ms = 0.0, float("inf")
        if flood is not None:
            first_ms = (await flood).timestamp
            async with reader(brokers, topics["dead_letters"]) as letters:
                last_ms = max(record.timestamp for record in await read_until(letters, bad))
        taken = [answers[name] - at for name, at in sent_ms.items() if first_ms <= at <= last_ms]
        return {"median_ms": statistics.median(taken), "jobs": len(taken)}
    finally:
        process.kill()


@dataclass(frozen=True)
class Passing:
    """Records a second: of the bad ones until the first good answer, of the good ones behind, and of all."""

    bad_per_s: float
    good_per_s: float
    all_per_s: float


async def passing(brokers: str, directory: Path, contender: str, bad: int, behind: int) -> Passing:
    """One partition with ``bad`` messages and ``behind`` good jobs after them."""
    topics = await make_topics(brokers)
    async with AIOKafkaProducer(bootstrap_servers=brokers, linger_ms=5) as producer:
        values = [BAD] * bad + [good(f"behind-{number}") for number in range(behind)]
        await send_all(producer, topics["jobs"], values, 0)
    process = (worker if contender == "worker" else plain_loop)(brokers, topics, directory)
    process.start()
    try:
        async with reader(brokers, topics["results"]) as results:
            answered = [record.timestamp for record in await read_until(results, behind)]
        async with reader(brokers, topics["dead_letters"]) as letters:
            began = min(record.timestamp for record in await read_until(letters, bad)) if bad else min(answered)
    finally:
        process.kill()
    first, last = min(answered), max(answered)

    def per_s(records: int, ms: float) -> float:
        return records / max(0.001, ms / 1000)

    return Passing(per_s(bad, first - began), per_s(behind, last - first), per_s(bad + behind, last - began))


async def measure(bad: int, behind: int, runs: int, seconds: float) -> dict[str, Any]:
    alone, beside, ours, plain, without = [], [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        async with KafkaNode(directory) as node:
            brokers = node.bootstrap_servers
            for _ in range(runs):
                alone.append(await latency_beside(brokers, directory, 0, seconds))
                beside.append(await latency_beside(brokers, directory, bad, seconds))
                ours.append(await passing(brokers, directory, "worker", bad, behind))
                plain.append(await passing(brokers, directory, "plain", bad, behind))
                without.append(await passing(brokers, directory, "worker", 0, behind))
                print(f"alone {alone[-1]}, beside {beside[-1]}, {ours[-1]}, plain {plain[-1]}, none bad {without[-1]}")
    quiet, loud = (statistics.median(run["median_ms"] for run in some) for some in (alone, beside))
    ours_bad, plain_bad = (statistics.median(run.bad_per_s for run in some) for some in (ours, plain))
    behind_bad, behind_none = (statistics.median(run.good_per_s for run in some) for some in (ours, without))
    return {
        "latency_alone_ms": quiet,
        "latency_beside_ms": loud,
        "latency_ratio": loud / quiet,
        "bad_pass_per_s": ours_bad,
        "bad_pass_plain_per_s": plain_bad,
        "bad_pass_ratio": ours_bad / plain_bad,
        "good_behind_bad_per_s": behind_bad,
        "good_behind_none_per_s": behind_none,
        "good_behind_ratio": behind_bad / behind_none,
        "runs": {
            "alone": alone,
            "beside": beside,
            "passing": [asdict(run) for run in ours],
            "plain": [asdict(run) for run in plain],
            "none_bad": [asdict(run) for run in without],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bad", type=int, default=10_000)
    parser.add_argument("--behind", type=int, default=2_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="how long good jobs arrive")
    add_output(parser, "poison.json")
    parser.add_argument("--plain-loop", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain_loop:
        asyncio.run(loop_plainly(*options.plain_loop))
        return
    load = os.getloadavg()[0]
    figures = asyncio.run(measure(options.bad, options.behind, options.runs, options.seconds))
    command = f"python benchmarks/poison.py --bad {options.bad} --behind {options.behind} --runs {options.runs}"
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "load_average_at_start": load}
    write_text(options.output, json.dumps({"command": command, "machine": machine, **figures}, indent=2) + "\n")
    print(json.dumps({name: value for name, value in figures.items() if name != "runs"}, indent=2))


if __name__ == "__main__":
    main()
