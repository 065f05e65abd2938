"""The first start of a worker on a cluster on which nothing has run: the internal topics are made meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from parts import KafkaNode, create_topic, eventually, worker_process

pytestmark = pytest.mark.kafka

JOBS = 30
TOPICS = {name: f"first.{name}" for name in ("jobs", "results", "metrics", "dead_letters", "in_flight")}
MODES = pytest.mark.parametrize("mode", ["at_least_once", "exactly_once"])


@MODES
@pytest.mark.parametrize("partitions", [1, 12, pytest.param(120, marks=pytest.mark.proof)])
async def test_the_first_worker_of_a_cluster_answers_and_stops_in_order(
    tmp_path: Path, partitions: int, mode: str
) -> None:
    await first_start(tmp_path, partitions, mode)


@pytest.mark.proof
@MODES
@pytest.mark.parametrize("partitions", [1, 12, 120])
@pytest.mark.parametrize("repetition", range(10))
async def test_the_first_worker_of_a_cluster_starts_every_time(
    tmp_path: Path, partitions: int, mode: str, repetition: int
) -> None:
    await first_start(tmp_path, partitions, mode)


async def first_start(tmp_path: Path, partitions: int, mode: str) -> None:
    async with KafkaNode(tmp_path) as node:
        await create_topic(node.bootstrap_servers, TOPICS["jobs"], partitions=partitions)
        await create_topic(node.bootstrap_servers, TOPICS["results"], TOPICS["metrics"], TOPICS["dead_letters"])
        async with AIOKafkaProducer(bootstrap_servers=node.bootstrap_servers) as producer:
            for number in range(JOBS):
                job = json.dumps({"job_id": f"j{number}", "prompt": "p"}).encode()
                await producer.send_and_wait(TOPICS["jobs"], job, partition=number % partitions)
        settings = {
            "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": node.bootstrap_servers,
            "NANOVLLM_ENGINE__BACKEND": "echo",
            "NANOVLLM_DELIVERY": mode,
            **{f"NANOVLLM_TOPICS__{name.upper()}": topic for name, topic in TOPICS.items()},
        }
        worker = worker_process(tmp_path, settings=settings)
        worker.start()
        try:
            answered: set[bytes] = set()
            async with AIOKafkaConsumer(
                TOPICS["results"],
                bootstrap_servers=node.bootstrap_servers,
                auto_offset_reset="earliest",
                isolation_level="read_committed",
            ) as consumer:
                while len(answered) < JOBS:
                    assert worker.is_running, worker.tail(30)
                    for batch in (await consumer.getmany(timeout_ms=200)).values():
                        answered |= {record.key for record in batch}
            worker.terminate()
            await eventually(lambda: not worker.is_running)
        finally:
            worker.kill()
    assert worker.exit_code == 0, worker.tail(30)
    said = worker.tail(1_000)
    assert "Traceback" not in said
    assert "ERROR nanovllm" not in said
