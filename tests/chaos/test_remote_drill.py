"""Two workers before two servers that fail in every way: every job ends once, and no server's fault is a job's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from chaos.endpoint_proxy import GRACE_S, EndpointProxy
from chaos.remote_drill import EVERY_FAULT, run_remote_drill
from chaos.remote_parts import Server
from parts import S3Part, eventually

MODES = ["exactly_once", "at_least_once"]


async def test_the_proxy_finds_who_asks_too_early_and_how_many_ask_at_once() -> None:
    body = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
    async with Server() as server, httpx.AsyncClient(headers={"authorization": "Bearer me"}) as client:
        proxy = EndpointProxy(server, "http://nowhere", Random(1))
        await proxy.start()

        async def ask() -> int:
            return (await client.post(f"{proxy.url}/chat/completions", json=body)).status_code

        server.gate = asyncio.Event()
        asking = [asyncio.create_task(ask()) for _ in range(3)]
        await eventually(lambda: server.at_once == 3)
        server.gate.set()
        assert await asyncio.gather(*asking) == [200] * 3
        assert proxy.most_at_once() == {"me": ["none"] * 3}
        proxy.fault = "busy_seconds"
        assert await ask() == 429
        proxy.fault = None
        assert await ask() == 200  # under way already, as far as anyone can tell
        assert proxy.early == []
        await asyncio.sleep(GRACE_S)
        assert await ask() == 200
        assert len(proxy.early) == 1
        await proxy.stop()


@pytest.mark.kafka
@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize("delivery", MODES)
async def test_servers_that_fail_in_every_way_cost_no_job(kafka_broker, versity_s3, tmp_path, delivery: str) -> None:
    faults = EVERY_FAULT[MODES.index(delivery) :: len(MODES)]
    await costs_no_job(kafka_broker, versity_s3, tmp_path, delivery, seed=1, kills=1, faults=faults)


@pytest.mark.kafka
@pytest.mark.s3
@pytest.mark.proof
@pytest.mark.parametrize("seed", range(2, 12))
@pytest.mark.parametrize("delivery", MODES)
async def test_servers_that_fail_by_many_seeds_cost_no_job(
    kafka_broker, versity_s3, tmp_path, delivery: str, seed: int
) -> None:
    await costs_no_job(kafka_broker, versity_s3, tmp_path, delivery, seed=seed, kills=2)


async def costs_no_job(brokers: str, s3: S3Part, directory: Path, delivery: str, **options: Any) -> None:
    report = await run_remote_drill(brokers, s3, directory, delivery=delivery, **options)
    assert report["broken_promises"] == [], report
