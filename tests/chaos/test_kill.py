"""kill -9 in the middle of the work: nothing is lost, and what is answered twice is the same answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from parts import evict_members, png
from world import World

from nanovllm.messages.job import Job

JOBS = 300
IMAGES = 60
KILL_AFTER = 60
READ_S = 30.0  # what is in the topic comes at once; this long only when something is missing
TINY_MODEL = Path(__file__).resolve().parents[2] / "nanovllm" / "checkpoints" / "assets" / "tiny-receipts"
# A narrow window: the kill falls into the work and not behind it.
NARROW = {"NANOVLLM_ADMISSION__MAX_JOBS": "8"}


async def produce(world: World, prompt: str) -> set[str]:
    """300 jobs about 60 images in turn; returns their ids."""
    uris = [world.s3.put(world.bucket, f"{number}.png", png((number, 255 - number, 40))) for number in range(IMAGES)]
    jobs = [Job(job_id=f"job-{number:03d}", prompt=prompt, images=(uris[number % IMAGES],)) for number in range(JOBS)]
    async with world.producer() as producer:
        await asyncio.gather(*(producer.send_job(job) for job in jobs))
    return {str(job.job_id) for job in jobs}


async def survives_a_kill(world: World, prompt: str, bury: Callable[[World], Awaitable[object]]) -> None:
    await world.create_topics()
    jobs = await produce(world, prompt)
    async with world.reader() as reader:
        first = world.worker("first")
        first.start()
        try:
            while len(world.results) < KILL_AFTER:
                assert first.is_running, first.tail(30)
                await world.read(reader)
        finally:
            first.kill()
        await world.read(reader)
        assert len(world.results) < JOBS, "the kill came too late to be one in the middle"
        assert await world.lag() > 0

        await bury(world)
        await world.drain("second")
        deadline = time.monotonic() + READ_S
        while jobs - world.results.keys():
            await world.read(reader)
            assert time.monotonic() < deadline, f"no result for {sorted(jobs - world.results.keys())}"
    assert world.results.keys() == jobs
    assert not world.dead_letters
    for answers in world.results.values():
        assert len({(answer.result_id, answer.text) for answer in answers}) == 1
    assert await world.lag() == 0


async def nothing(world: World) -> None:
    """A real broker's session timeout does it."""


async def evict(world: World) -> None:
    """The embedded broker never notices that a member died."""
    assert len(await evict_members(world.bootstrap_servers, world.group)) == 1


@pytest.mark.kafka
async def test_no_job_is_lost_when_the_worker_is_killed_on_apache_kafka(kafka_broker, s3, tmp_path):
    world = World(kafka_broker, s3, tmp_path, {"NANOVLLM_ENGINE__BACKEND": "echo", **NARROW})
    await survives_a_kill(world, "Say <|image|>", nothing)


async def test_no_job_is_lost_when_the_worker_is_killed_on_the_embedded_broker(embedded_broker, s3, tmp_path):
    world = World(embedded_broker, s3, tmp_path, {"NANOVLLM_ENGINE__BACKEND": "echo", **NARROW})
    await survives_a_kill(world, "Say <|image|>", evict)


@pytest.mark.timeout(600)
@pytest.mark.skipif(not (TINY_MODEL / "config.json").exists(), reason="the tiny checkpoint is not in this tree")
async def test_no_job_is_lost_when_the_worker_is_killed_with_the_model_at_work(embedded_broker, s3, tmp_path):
    world = World(embedded_broker, s3, tmp_path, {"NANOVLLM_SAMPLING__MAX_TOKENS": "8", **NARROW})
    await survives_a_kill(world, "What is the total? <|image|>", evict)
