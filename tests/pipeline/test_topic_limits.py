"""A topic whose limit is below what the producer would put into one batch."""

from __future__ import annotations

import asyncio

import pytest
from parts import create_topic
from world import World

from nanovllm.messages.job import Job

pytestmark = pytest.mark.kafka

JOBS = 400


async def test_small_results_are_not_refused_together_for_their_batch_is_too_large(kafka_broker, s3, tmp_path):
    world = World(kafka_broker, s3, tmp_path, {"NANOVLLM_ENGINE__BACKEND": "echo"})
    topics = world.topics
    await create_topic(kafka_broker, topics.jobs, topics.metrics, topics.dead_letters)
    await create_topic(kafka_broker, topics.results, partitions=1, settings={"max.message.bytes": "4000"})
    async with world.producer() as producer, world.reader() as reader:
        await asyncio.gather(*(producer.send_job(Job(job_id=f"j-{n}", prompt="Say so")) for n in range(JOBS)))
        worker = world.worker("w")
        worker.start()
        try:
            async with asyncio.timeout(100):
                while len(world.results) + len(world.dead_letters) < JOBS:
                    await world.read(reader)
        finally:
            worker.kill()
    assert not world.dead_letters
    assert len(world.results) == JOBS
