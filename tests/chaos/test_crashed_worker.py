"""One job that takes the whole process down, among good ones on three workers."""

from __future__ import annotations

import asyncio
from random import Random

import pytest
from chaos.faulty_worker import HUNGER, POISON, UNDECODABLE
from chaos.fleet import Fleet
from parts import create_topic
from world import World

from nanovllm.messages.job import Job

pytestmark = pytest.mark.kafka

GOOD = 200
LIMIT = 2
SETTINGS = {
    "NANOVLLM_ENGINE__BACKEND": "echo",
    "NANOVLLM_DEAD_LETTERS__CRASH_LIMIT": str(LIMIT),
    "NANOVLLM_KAFKA__SESSION_TIMEOUT_MS": "1500",
    "NANOVLLM_KAFKA__HEARTBEAT_INTERVAL_MS": "300",
    "NANOVLLM_ADMISSION__DRAIN_TIMEOUT_S": "3",
}


@pytest.mark.parametrize(
    ("delivery", "prompt", "exit_code"),
    [
        ("at_least_once", POISON, -11),
        ("exactly_once", POISON, -11),
        ("at_least_once", HUNGER, -9),
        ("at_least_once", UNDECODABLE, -11),
        ("exactly_once", UNDECODABLE, -11),
    ],
    ids=["segfault", "segfault exactly_once", "out of memory", "decoding", "decoding exactly_once"],
)
async def test_the_culprit_is_buried_the_innocent_are_answered_and_the_fleet_lives(
    kafka_broker, s3, tmp_path, delivery: str, prompt: str, exit_code: int
):
    world = World(kafka_broker, s3, tmp_path, {**SETTINGS, "NANOVLLM_DELIVERY": delivery})
    await world.create_topics()
    await create_topic(
        kafka_broker, world.topics.in_flight, partitions=2, settings={"cleanup.policy": "compact"}
    )  # fmt: skip
    jobs = [Job(job_id=f"job-{number:03d}", prompt=f"Say {number}") for number in range(GOOD)]
    jobs.insert(GOOD // 2, Job(job_id="culprit", prompt=prompt))
    async with world.producer() as producer, world.reader() as reader:
        await asyncio.gather(*(producer.send_job(job) for job in jobs))
        async with Fleet(world, 3, Random(1)) as fleet:
            async with asyncio.timeout(200):
                while len(world.results) < GOOD or not world.dead_letters:
                    await world.read(reader)
            exit_codes = await fleet.drain()
        await world.read(reader)
    assert world.results.keys() == {f"job-{number:03d}" for number in range(GOOD)}
    ((culprit, letters),) = world.dead_letters.items()
    assert [letter.code for letter in letters] == ["crashed_worker"]
    assert culprit == "culprit"
    # The first death, among others, makes suspects; each of the next ones is counted.
    assert fleet.exit_codes == [exit_code] * (1 + LIMIT)
    assert exit_codes == [0, 0, 0]
