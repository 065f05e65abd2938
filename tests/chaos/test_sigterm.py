"""SIGTERM to one of two workers under load: it drains, says goodbye to the group, and nothing is done twice."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupCoordinatorNotAvailableError
from world import World

from nanovllm.messages.job import Job

pytestmark = pytest.mark.kafka

JOBS = 1_500
SETTINGS = {
    "NANOVLLM_ENGINE__BACKEND": "echo",
    # The test is over long before a silent member would be missed: only LeaveGroup can take it out of the group.
    "NANOVLLM_KAFKA__SESSION_TIMEOUT_MS": "250000",
    "NANOVLLM_KAFKA__HEARTBEAT_INTERVAL_MS": "300",
    "NANOVLLM_ADMISSION__DRAIN_TIMEOUT_S": "20",
}


async def test_a_worker_told_to_stop_under_load_leaves_the_group_and_repeats_nothing(kafka_broker, s3, tmp_path):
    world = World(kafka_broker, s3, tmp_path, SETTINGS)
    await world.create_topics()
    stays, goes = world.worker("stays"), world.worker("goes")
    try:
        for worker in (stays, goes):
            worker.start()
        for _ in range(300):
            if await members(world) == 2:
                break
            await asyncio.sleep(0.2)
        async with world.producer() as producer, world.reader() as reader:
            sending = asyncio.create_task(send_slowly(producer))
            async with asyncio.timeout(200):
                while len(world.results) < JOBS // 5:
                    await world.read(reader)
                # Both have partitions, and jobs go on coming.
                assert await asyncio.to_thread(goes.stop, 30.0) == 0
                assert not sending.done()
                for _ in range(100):
                    if await members(world) == 1:
                        break
                    await asyncio.sleep(0.2)
                assert await members(world) == 1
                await sending
                while len(world.results) < JOBS:
                    await world.read(reader)
            await asyncio.to_thread(stays.stop, 30.0)
            await world.read(reader)
    finally:
        for worker in (stays, goes):
            worker.kill()
    assert {job_id: len(answers) for job_id, answers in world.results.items() if len(answers) > 1} == {}
    assert not world.dead_letters
    assert await world.lag() == 0


async def send_slowly(producer) -> None:
    for start in range(0, JOBS, 25):
        jobs = [Job(job_id=f"j-{number}", prompt=f"Say {number}") for number in range(start, start + 25)]
        await asyncio.gather(*(producer.send_job(job) for job in jobs))
        await asyncio.sleep(0.2)


async def members(world: World) -> int:
    """Members of the group that have their partitions, as its coordinator has them now."""
    admin = AIOKafkaAdminClient(bootstrap_servers=world.bootstrap_servers)
    await admin.start()
    try:
        coordinator = await admin.find_coordinator(world.group)
        answers = await admin.describe_consumer_groups([world.group], group_coordinator_id=coordinator)
        groups = [group for answer in answers for group in answer.to_object()["groups"]]
        return sum(len(group["members"]) for group in groups if group["state"] == "Stable")
    except GroupCoordinatorNotAvailableError:
        return 0  # the broker's first group ever is still being set up
    finally:
        await admin.close()
