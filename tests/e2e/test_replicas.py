"""``nanovllm worker --replicas``: processes of one machine that share the work, and what happens when one dies."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from parts import eventually
from world import World

from nanovllm.demo.child_process import LocalProcess

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two replicas need two cores"),
]

START_S, READ_S = 120.0, 120.0
SETTINGS = {"NANOVLLM_WORKER_ID": "host", "NANOVLLM_KAFKA__GROUP_INSTANCE_ID": "seat"}


def processes(parent: LocalProcess) -> list[int]:
    """The current process of each replica."""
    found = dict(re.findall(r"replica (\d) is process (\d+)", parent.log.read_text()))
    return [int(found[index]) for index in sorted(found)]


def variables(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


def count(parent: LocalProcess, pattern: str) -> int:
    return len(re.findall(rf"(?m){pattern}", parent.log.read_text()))


async def joined(parent: LocalProcess, *times: int) -> None:
    """Wait until each replica has joined the group so many times."""

    def has_joined() -> bool:
        assert parent.is_running, parent.tail(40)
        return all(
            count(parent, rf"^\[{index}\] .* consuming .* as host-{index}") >= n for index, n in enumerate(times)
        )

    await eventually(has_joined, within_s=START_S, why="a replica does not join")


async def send(world: World, *names: str) -> None:
    async with world.producer() as producer:
        for name in names:
            await producer.send(f"Count to ten, {name}.", job_id=name, sampling={"max_tokens": 40})


async def read(world: World, names: set[str]) -> None:
    deadline = time.monotonic() + READ_S
    async with world.reader() as reader:
        while not names <= world.results.keys():
            await world.read(reader)
            assert time.monotonic() < deadline, f"without an answer: {sorted(names - world.results.keys())}"


async def test_replicas_share_cores_and_jobs_and_lose_none_when_one_is_killed(kafka_broker, s3, tmp_path: Path):
    world = World(kafka_broker, s3, tmp_path, SETTINGS)
    await world.create_topics()
    parent = world.worker("replicas", "--replicas", "2")
    parent.start()
    try:
        await joined(parent, 1, 1)
        first, second = processes(parent)
        sets = [os.sched_getaffinity(pid) for pid in (first, second)]
        assert not sets[0] & sets[1]
        assert sets[0] | sets[1] == os.sched_getaffinity(0)
        for pid, cores in zip((first, second), sets, strict=True):
            assert f"OMP_NUM_THREADS={len(cores)}" in variables(pid)

        names = {f"job-{number}" for number in range(40)}
        await send(world, *sorted(names))
        await read(world, {"job-0"})
        os.kill(second, signal.SIGKILL)
        await read(world, names)
        await joined(parent, 1, 2)
        assert count(parent, r"replica 1 ended \(signal 9\): it is started again in 1 s") == 1
        assert processes(parent) == [first, processes(parent)[1]]
        assert processes(parent)[1] != second

        late = {f"late-{number}" for number in range(16)}
        await send(world, *sorted(late))
        await read(world, {"late-0"})
        workers = {result.worker for found in world.results.values() for result in found}
        assert workers == {"host-0", "host-1"}
        parent.terminate()
        await eventually(lambda: not parent.is_running, within_s=60, why="the replicas do not drain")
        assert parent.exit_code == 0, parent.tail(40)
        assert count(parent, r"^\[[01]\] .*stopped: what has ended is committed") == 2
        left = await world.lag()
        async with world.reader() as reader:
            for _ in range(3):
                await world.read(reader)
        assert len(late - world.results.keys()) == left, "what was not answered is there for the next worker"
        assert not world.dead_letters
    finally:
        parent.stop()
