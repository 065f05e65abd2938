"""kill -9 and zombies under ``delivery: exactly_once``, beside the loop that aiokafka's documentation shows."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer
from parts import eventually
from world import World

from nanovllm.demo.child_process import LocalProcess
from nanovllm.messages.job import Job

pytestmark = pytest.mark.kafka

JOBS = 600
TRIES = 4
STOP_AFTER = 80
SESSION_S = 1.0
NAIVE = Path(__file__).with_name("naive_worker.py")
EXACTLY_ONCE = {
    "NANOVLLM_ENGINE__BACKEND": "echo",
    "NANOVLLM_DELIVERY": "exactly_once",
    "NANOVLLM_KAFKA__SESSION_TIMEOUT_MS": "1000",
    "NANOVLLM_KAFKA__HEARTBEAT_INTERVAL_MS": "200",
    # A narrow window: the fault falls into the work and not behind it.
    "NANOVLLM_ADMISSION__MAX_JOBS": "8",
}


async def produce(world: World) -> set[str]:
    async with world.producer() as producer:
        jobs = [Job(job_id=f"job-{number:04d}", prompt=f"Say {number}") for number in range(JOBS)]
        await asyncio.gather(*(producer.send_job(job) for job in jobs))
    return {str(job.job_id) for job in jobs}


class Answers:
    """How often a read_committed reader sees each job answered."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.seen: Counter[str] = Counter()

    async def __aenter__(self) -> Answers:
        self._consumer = AIOKafkaConsumer(
            self._world.topics.results,
            bootstrap_servers=self._world.bootstrap_servers,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
        )
        await self._consumer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._consumer.stop()

    async def read(self, timeout_ms: int = 200) -> int:
        batches = await self._consumer.getmany(timeout_ms=timeout_ms)
        records = [record.key.decode() for batch in batches.values() for record in batch]
        self.seen.update(records)
        return len(records)

    async def reach(self, count: int, *workers: LocalProcess) -> None:
        while len(self.seen) < count:
            for worker in workers:
                assert worker.is_running, worker.tail(30)
            await self.read()

    async def settle(self) -> None:
        """Read until nothing has come for a while."""
        while await self.read(2_000):
            pass


async def replace_while_stopped(
    world: World, start: Callable[[str], LocalProcess], *, kill: bool
) -> tuple[set[str], Counter[str]]:
    """One worker is stopped in the middle, another one does the rest, and the first one wakes up (or is dead)."""
    await world.create_topics()
    jobs = await produce(world)
    with ExitStack() as stack:
        async with Answers(world) as answers:
            first = start("first")
            stack.callback(first.kill)
            await answers.reach(STOP_AFTER, first)
            assert first.pid is not None
            os.kill(first.pid, signal.SIGKILL if kill else signal.SIGSTOP)
            await answers.settle()
            assert len(answers.seen) < JOBS, "the fault came too late to be one in the middle"
            await asyncio.sleep(SESSION_S)
            second = start("second")
            stack.callback(second.kill)
            await answers.reach(JOBS if kill else JOBS - 100, second)
            if not kill:
                # Between its session and the end of the work: the zombie finds itself in the way of its successor.
                os.kill(first.pid, signal.SIGCONT)
                await answers.reach(JOBS, first, second)
            await answers.settle()
            if kill:
                return jobs, answers.seen
            await asyncio.sleep(SESSION_S)
            await answers.settle()
    return jobs, answers.seen


def ours(world: World) -> Callable[[str], LocalProcess]:
    def start(name: str) -> LocalProcess:
        worker = world.worker(name)
        worker.start()
        return worker

    return start


def naive(world: World) -> Callable[[str], LocalProcess]:
    def start(name: str) -> LocalProcess:
        arguments = [world.bootstrap_servers, world.group, world.topics.jobs, world.topics.results, name]
        worker = LocalProcess(name, [sys.executable, str(NAIVE), *arguments], world.directory / f"{name}.log")
        worker.start()
        return worker

    return start


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "zombie"])
async def test_every_job_is_answered_once_whether_its_worker_is_killed_or_a_zombie(
    kafka_broker, s3, tmp_path, kill: bool
):
    world = World(kafka_broker, s3, tmp_path, EXACTLY_ONCE)
    jobs, seen = await replace_while_stopped(world, ours(world), kill=kill)
    assert seen.keys() == jobs
    assert {job for job, times in seen.items() if times > 1} == set()
    if kill:
        await eventually_no_lag(world)


async def test_the_documented_loop_answers_jobs_twice_when_its_worker_is_a_zombie(kafka_broker, s3, tmp_path):
    # It depends on where the zombie was stopped, and so on the machine: not every try shows it.
    for _ in range(TRIES):
        world = World(kafka_broker, s3, tmp_path, {})
        jobs, seen = await replace_while_stopped(world, naive(world), kill=False)
        doubled = {job for job, times in seen.items() if times > 1}
        if doubled or seen.keys() != jobs:
            return
    pytest.fail("if this loop were safe, ours would be needless")


async def eventually_no_lag(world: World) -> None:
    lags: list[int] = []
    for _ in range(100):
        lags.append(await world.lag())
        if not lags[-1]:
            return
        await asyncio.sleep(0.1)
    await eventually(lambda: False, within_s=0, why=f"the lag stayed at {lags[-1]}")
