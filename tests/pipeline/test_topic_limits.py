"""A topic whose limit is below what the producer would put into one batch, from the start or later."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
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


async def lower_limit(broker: str, topic: str, max_bytes: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=broker)
    await admin.start()
    try:
        limit = {"max.message.bytes": str(max_bytes)}
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, limit)])
    finally:
        await admin.close()


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_a_limit_that_is_lowered_while_the_worker_runs_refuses_only_what_is_too_large(
    kafka_broker, s3, tmp_path, delivery: str
):
    world = World(kafka_broker, s3, tmp_path, {"NANOVLLM_ENGINE__BACKEND": "echo", "NANOVLLM_DELIVERY": delivery})
    topics = world.topics
    await create_topic(kafka_broker, topics.jobs, topics.metrics, topics.dead_letters)
    await create_topic(kafka_broker, topics.results, partitions=1)
    worker = world.worker("w")
    async with world.producer() as producer, world.reader() as reader:

        async def outcomes(count: int) -> None:
            async with asyncio.timeout(100):
                while len(world.results) + len(world.dead_letters) < count:
                    await world.read(reader)

        worker.start()
        try:
            await producer.send_job(Job(job_id="before", prompt="Say so"))
            await outcomes(1)
            await lower_limit(kafka_broker, topics.results, 3_000)
            await asyncio.gather(
                *(producer.send_job(Job(job_id=f"j-{n}", prompt="Say so")) for n in range(JOBS)),
                producer.send_job(Job(job_id="large", prompt="x" * 6_000)),
            )
            await outcomes(JOBS + 2)
        finally:
            worker.kill()
    assert set(world.dead_letters) == {"large"}
    assert len(world.results) == JOBS + 1


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
@pytest.mark.parametrize("lowered", ["results", "metrics"])
async def test_the_first_record_after_a_limit_was_lowered_is_refused_alone_and_the_worker_goes_on(
    kafka_broker, s3, tmp_path, delivery: str, lowered: str
):
    world = World(kafka_broker, s3, tmp_path, {"NANOVLLM_ENGINE__BACKEND": "echo", "NANOVLLM_DELIVERY": delivery})
    topics = world.topics
    await create_topic(kafka_broker, topics.jobs, topics.results, topics.metrics, topics.dead_letters)
    worker = world.worker("w")
    async with world.producer() as producer, world.reader() as reader:
        worker.start()
        try:
            await producer.send_job(Job(job_id="before", prompt="Say so"))
            async with asyncio.timeout(100):
                while not world.results:
                    await world.read(reader)
            await lower_limit(kafka_broker, getattr(topics, lowered), 600)
            await producer.send_job(Job(job_id="large", prompt="x" * 2_000))
            async with asyncio.timeout(100):
                while not world.dead_letters:
                    await world.read(reader)
            await lower_limit(kafka_broker, getattr(topics, lowered), 1 << 20)
            await producer.send_job(Job(job_id="behind", prompt="Say so"))
            assert worker.is_running
        finally:
            worker.kill()
    assert {job: letters[0].code for job, letters in world.dead_letters.items()} == {"large": "message_too_large"}
