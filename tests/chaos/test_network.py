"""Workers behind a network that is slow, silent or cut: by a proxy of ours, and by Toxiproxy."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chaos.proxies import NetworkLine, OwnLine
from chaos.toxiproxy import ToxiproxyLine
from parts import KafkaNode, S3Part
from world import World

from nanovllm.demo.child_process import free_port

pytestmark = pytest.mark.kafka

JOBS = 40


@dataclass
class Site:
    """A worker's world whose brokers are behind ``line``."""

    line: NetworkLine
    world: World
    http_port: int

    async def get(self, path: str) -> tuple[int, dict[str, Any]]:
        """Status and body of the worker's answer; (0, {}) without one."""

        def ask() -> tuple[int, dict[str, Any]]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=5) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                return error.code, json.load(error)
            except OSError:
                return 0, {}

        return await asyncio.to_thread(ask)

    async def reports(self, path: str, status: int, *, within_s: float = 60.0) -> dict[str, Any]:
        """The body of the first answer of that status."""
        async with asyncio.timeout(within_s):
            while True:
                found, body = await self.get(path)
                if found == status:
                    return body
                await asyncio.sleep(0.2)

    async def submit(self, *names: str) -> None:
        async with self.world.producer() as producer:
            for name in names:
                await producer.send("p", job_id=name)


@pytest.fixture(params=["own", pytest.param("toxiproxy", marks=pytest.mark.toxiproxy)])
async def site(request: pytest.FixtureRequest, s3: S3Part, tmp_path: Path) -> AsyncIterator[Site]:
    port, http_port = free_port(), free_port()
    node = KafkaNode(tmp_path, settings={"advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}"})
    is_own = request.param == "own"
    line: NetworkLine = OwnLine(port, node.port) if is_own else ToxiproxyLine(port, node.port, tmp_path)
    try:
        await line.start()
        await node.start()
        settings = {"NANOVLLM_ENGINE__BACKEND": "echo", "NANOVLLM_HTTP__PORT": str(http_port)}
        world = World(f"127.0.0.1:{port}", s3, tmp_path, settings)
        await world.create_topics()
        yield Site(line, world, http_port)
    finally:
        node.kill()
        await line.stop()


async def test_brokers_that_hang_with_open_connections_make_the_worker_unready_and_nothing_else(site: Site) -> None:
    worker = site.world.worker("worker")
    worker.start()
    try:
        await site.reports("/readyz", 200)
        await site.submit("before")
        async with site.world.reader() as reader:
            await eventually_read(site.world, reader, 1)
            await site.line.spoil("silent")
            said = await site.reports("/readyz", 503)
            assert "the consumer group is not joined at the brokers" in " ".join(said["reasons"])
            assert (await site.get("/healthz"))[0] == 200
            assert (await site.get("/stats"))[1]["idle"]["now"] == "broker"
            await site.line.heal()
            await site.reports("/readyz", 200)
            await site.submit("after")
            await eventually_read(site.world, reader, 2)
        assert worker.is_running, worker.tail(30)
        assert (await site.get("/stats"))[1]["idle"]["now"] == "empty"
    finally:
        worker.stop(grace_s=30)


@pytest.mark.slow
async def test_a_slow_line_that_is_cut_again_and_again_costs_no_job(site: Site) -> None:
    names = [f"j{number}" for number in range(JOBS)]
    worker = site.world.worker("worker")
    worker.start()
    try:
        await site.reports("/readyz", 200)
        for first in range(0, JOBS, 10):
            await site.line.spoil("slow")
            await site.submit(*names[first : first + 10])
            await site.line.spoil("cut")
            await site.line.heal()
        async with site.world.reader() as reader:
            await eventually_read(site.world, reader, JOBS)
        assert site.world.results.keys() == set(names)
        assert not site.world.dead_letters
    finally:
        worker.stop(grace_s=30)


async def eventually_read(world: World, reader: Any, outcomes: int) -> None:
    async with asyncio.timeout(120):
        while len(world.results) + len(world.dead_letters) < outcomes:
            await world.read(reader)
