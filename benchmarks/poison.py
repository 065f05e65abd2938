"""Ten thousand bad messages in a row: what they cost the jobs beside them and the jobs behind them, on Apache Kafka.

    python benchmarks/poison.py [--bad 10000] [--behind 2000] [--runs 5]

Two questions, asked by turns, the engine echoing. **Beside**: good jobs arrive steadily on three partitions, once
alone and once while the bad ones lie on the fourth; the latency is from a job's timestamp to its result's, over the
jobs that came while bad ones were worked off. **Behind**: good jobs wait behind the bad ones on one partition; the rate
is all records over the time from the first one's end to the last good answer, beside a loop that only takes a record,
parses it and sends one on.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from parts import KafkaNode, create_topic, unique_name, worker_process

from nanovllm.pipeline.local_process import LocalProcess

RESULTS = Path(__file__).parent / "results" / "poison.json"
PARTITIONS = 4
GOOD_PER_S = 50
BAD = b'{"prompt": "a job that ends in the middle of'


async def make_topics(brokers: str) -> dict[str, str]:
    base = unique_name("poison")
    topics = {name: f"{base}.{name}" for name in ("jobs", "results", "metrics", "dead_letters")}
    await create_topic(brokers, *topics.values(), partitions=PARTITIONS)
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
            AIOKafkaProducer(bootstrap_servers=brokers) as producer,
            reader(brokers, topics["results"]) as results,
            reader(brokers, topics["dead_letters"]) as letters,
        ):
            warm_up = [good(f"warm-{number}") for number in range(50)]
            await send_all(producer, topics["jobs"], warm_up, 1)
            await read_until(results, len(warm_up))
            if bad:
                await send_all(producer, topics["jobs"], [BAD] * bad, 0)
            sent_ms: dict[bytes, int] = {}
            began = time.monotonic()
            for number in range(int(GOOD_PER_S * seconds)):
                name = f"good-{number}"
                record = await producer.send_and_wait(topics["jobs"], good(name), partition=1 + number % 3)
                sent_ms[name.encode()] = record.timestamp
                await asyncio.sleep(max(0.0, began + (number + 1) / GOOD_PER_S - time.monotonic()))
            answers = {record.key: record.timestamp for record in await read_until(results, len(sent_ms))}
            worked_off_ms = (await read_until(letters, bad))[-1].timestamp if bad else float("inf")
        taken = [answers[name] - at for name, at in sent_ms.items() if at <= worked_off_ms]
        return {"median_ms": statistics.median(taken), "jobs": len(taken)}
    finally:
        process.kill()


async def rate_behind(brokers: str, directory: Path, contender: str, bad: int, behind: int) -> float:
    """Records a second on one partition of ``bad`` messages and ``behind`` good jobs after them."""
    topics = await make_topics(brokers)
    async with AIOKafkaProducer(bootstrap_servers=brokers, linger_ms=5) as producer:
        values = [BAD] * bad + [good(f"behind-{number}") for number in range(behind)]
        await send_all(producer, topics["jobs"], values, 0)
    process = (worker if contender == "worker" else plain_loop)(brokers, topics, directory)
    process.start()
    try:
        async with reader(brokers, topics["results"]) as results, reader(brokers, topics["dead_letters"]) as letters:
            first = (await read_until(letters, 1))[0].timestamp
            last = max(record.timestamp for record in await read_until(results, behind))
        return (bad + behind) / max(0.001, (last - first) / 1000)
    finally:
        process.kill()


async def measure(bad: int, behind: int, runs: int, seconds: float) -> dict[str, Any]:
    alone, beside, ours, plain = [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        async with KafkaNode(directory) as node:
            brokers = node.bootstrap_servers
            for _ in range(runs):
                alone.append(await latency_beside(brokers, directory, 0, seconds))
                beside.append(await latency_beside(brokers, directory, bad, seconds))
                ours.append(await rate_behind(brokers, directory, "worker", bad, behind))
                plain.append(await rate_behind(brokers, directory, "plain", bad, behind))
                print(f"alone {alone[-1]}, beside {beside[-1]}, behind {ours[-1]:.0f}/s, plain {plain[-1]:.0f}/s")
    quiet, loud = (statistics.median(run["median_ms"] for run in some) for some in (alone, beside))
    return {
        "latency_alone_ms": quiet,
        "latency_beside_ms": loud,
        "latency_ratio": loud / quiet,
        "rate_behind_per_s": statistics.median(ours),
        "rate_plain_per_s": statistics.median(plain),
        "rate_ratio": statistics.median(ours) / statistics.median(plain),
        "runs": {"alone": alone, "beside": beside, "behind_per_s": ours, "plain_per_s": plain},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bad", type=int, default=10_000)
    parser.add_argument("--behind", type=int, default=2_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="how long good jobs arrive")
    parser.add_argument("--plain-loop", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain_loop:
        asyncio.run(loop_plainly(*options.plain_loop))
        return
    load = os.getloadavg()[0]
    figures = asyncio.run(measure(options.bad, options.behind, options.runs, options.seconds))
    command = f"python benchmarks/poison.py --bad {options.bad} --behind {options.behind} --runs {options.runs}"
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "load_average_at_start": load}
    RESULTS.write_text(json.dumps({"command": command, "machine": machine, **figures}, indent=2) + "\n")
    print(json.dumps({name: value for name, value in figures.items() if name != "runs"}, indent=2))


if __name__ == "__main__":
    main()
