"""The status page of a worker and the JSON behind it, with hostile names in jobs, in headless Chromium."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from bench import Bench, eventually
from chromium import DESKTOP, PHONE, Window, needs_chromium, window
from document_bench import Documents
from pdf_files import PROSE, text_pdf

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.metrics import Metrics
from nanovllm.pipeline.operations.health import Health, HealthServer
from nanovllm.pipeline.worker import Worker
from nanovllm.pipeline.worker_status import worker_status
from nanovllm.settings.engine import EngineSettings
from nanovllm.settings.tenants import TenantSettings
from nanovllm.settings.worker import HttpSettings

HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


def text_route(bucket: str) -> dict[str, Any]:
    """A route that asks no engine for clean pages."""
    return {
        "name": "invoices",
        "match": {"bucket": bucket, "key": "in/**"},
        "prompt": "Read the page.",
        "text": "only_if_clean",
    }


@asynccontextmanager
async def answering(worker: Worker, metrics: Metrics) -> AsyncIterator[str]:
    """The address of the status page of ``worker``."""
    server = HealthServer(worker.health, metrics, host="127.0.0.1", port=0)
    server.status = partial(worker_status, worker)
    worker.health.is_model_loaded = True
    server.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.close()


@asynccontextmanager
async def served(bench: Bench, engine: EchoEngine, **settings: Any) -> AsyncIterator[tuple[Worker, str]]:
    """A worker at work, and the address of its status page."""
    async with (
        engine,
        bench.working(engine, **settings) as (worker, _),
        answering(worker, bench.metrics) as url,
    ):
        yield worker, url


async def get(url: str) -> tuple[bytes, dict[str, str]]:
    def ask() -> tuple[bytes, dict[str, str]]:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.read(), dict(answer.headers)

    return await asyncio.to_thread(ask)


async def stats_of(url: str) -> dict[str, Any]:
    return dict(json.loads((await get(f"{url}/stats"))[0]))


async def test_stats_have_the_queue_the_jobs_and_what_the_engine_waited_for(bench: Bench) -> None:
    secret = "the text of a job"
    price = HttpSettings(cost_per_hour=3.6)
    async with served(bench, EchoEngine(), http=price) as (worker, url):
        await bench.send({"job_id": HOSTILE, "prompt": secret}, {"job_id": "b", "prompt": secret}, {"nonsense": True})
        await bench.results(2)
        await bench.dead_letters(1)
        await eventually(lambda: len(worker.recent.last(9)) == 2 and bool(worker.lags))
        stats = await stats_of(url)
    assert secret not in json.dumps(stats)
    assert {job["job_id"] for job in stats["recent"]} == {HOSTILE, "b"}
    assert {job["outcome"] for job in stats["recent"]} == {"result"}
    assert stats["worker"]["model"] == "echo"
    assert stats["queue"]["group"] == bench.settings.kafka.group_id
    assert {one["topic"] for one in stats["queue"]["partitions"]} == {bench.settings.topics.jobs}
    assert stats["dead_letters"] == {"invalid_job": 1}
    assert stats["rates"]["jobs"] > 0
    assert set(stats["latency_s"]) >= {"total", "infer", "publish"}
    assert stats["idle"]["seconds"]
    route = stats["routes"][bench.settings.topics.jobs]
    assert route["jobs"] == 2
    assert route["cost_a_thousand"] == pytest.approx(route["seconds_a_thousand"] / 1_000)


async def test_a_worker_that_starts_has_stats_that_say_so() -> None:
    server = HealthServer(Health(), Metrics(), host="127.0.0.1", port=0)
    server.start()
    try:
        stats = await stats_of(f"http://127.0.0.1:{server.port}")
    finally:
        server.close()
    assert stats["worker"]["state"] == "starting"
    assert "the model is not loaded" in stats["worker"]["reasons"]


async def test_the_page_allows_its_own_script_and_nothing_else(bench: Bench) -> None:
    async with served(bench, EchoEngine()) as (_, url):
        body, headers = await get(f"{url}/")
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert b"http://" not in body
    assert b"https://" not in body


@asynccontextmanager
async def opened(url: str, size: tuple[int, int]) -> AsyncIterator[Window]:
    """The page in a browser; at the end it has had no error and has asked nobody else."""
    async with window(size) as shown:
        await shown.page.goto(url)
        await shown.page.get_by_text("No job has ended.").first.wait_for()
        yield shown
        assert await shown.overflow() == []
        assert shown.faults == []
        assert [one for one in shown.requests if not one.startswith((url, "data:"))] == []


async def row_of(shown: Window, table: str, name: str) -> list[str]:
    """The cells of the row that ``name`` begins, once it is there."""
    first = shown.page.locator("td:first-child", has_text=re.compile(f"^{re.escape(name)}$"))
    row = shown.page.locator(f"#{table} tr").filter(has=first).first
    await row.wait_for(timeout=30_000)
    cells: list[str] = await row.locator("td").all_text_contents()
    return cells


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
async def test_the_open_page_shows_jobs_as_they_end_and_hostile_names_as_text(
    bench: Bench, size: tuple[int, int]
) -> None:
    settings = {"http": HttpSettings(cost_per_hour=3.6), "tenants": TenantSettings(header="tenant")}
    hostile = {"headers": [("tenant", HOSTILE.encode())]}
    async with served(bench, EchoEngine(), **settings) as (worker, url), opened(url, size) as shown:
        await bench.send({"job_id": HOSTILE, "prompt": "a"}, {"job_id": "second", "prompt": "b"}, **hostile)
        cells = await row_of(shown, "recent", HOSTILE)
        assert cells[:4] == [HOSTILE, HOSTILE, bench.settings.topics.jobs, "result"]
        await bench.send({"job_id": "third", "prompt": "c"}, {"nonsense": True}, **hostile)
        assert (await row_of(shown, "recent", "third"))[3] == "result"
        assert (await row_of(shown, "letters", "invalid_job"))[1] == "1"
        jobs, _, cost = (await row_of(shown, "routes", bench.settings.topics.jobs))[1:]
        assert int(jobs) >= 2
        assert float(cost) >= 0
        assert await shown.page.locator("img").count() == 0
        assert await shown.page.title() == worker.settings.worker_id


@needs_chromium
@pytest.mark.slow
async def test_the_open_page_shows_seconds_and_cost_of_each_route_of_documents(documents: Documents) -> None:
    price, engine = HttpSettings(cost_per_hour=3.6), EngineSettings(backend="echo")
    settings = documents.settings(text_route(documents.bucket), http=price, engine=engine)
    async with (
        documents.working(**settings) as (worker, _),
        answering(worker, documents.bench.metrics) as url,
        opened(url, PHONE) as shown,
    ):
        await documents.send(*(documents.put(f"in/{number}.pdf", text_pdf(PROSE)) for number in range(3)))
        jobs, seconds, cost = (await row_of(shown, "routes", "invoices"))[1:]
        assert int(jobs) >= 1
        assert float(cost) == pytest.approx(float(seconds) / 1_000, abs=1e-3)


@needs_chromium
@pytest.mark.slow
async def test_the_open_page_says_when_the_worker_is_gone_and_when_it_is_back(bench: Bench) -> None:
    from playwright.async_api import expect

    async with served(bench, EchoEngine()) as (_, url), window(PHONE) as shown:
        await shown.page.goto(url)
        state = expect(shown.page.locator("#state"))
        await state.to_have_text("ready")
        await shown.page.context.set_offline(True)
        await state.to_have_text("no answer", timeout=30_000)
        await shown.page.context.set_offline(False)
        await state.to_have_text("ready", timeout=30_000)
