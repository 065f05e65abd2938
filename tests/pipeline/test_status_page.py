"""The status page of a worker and the JSON behind it, with hostile names in jobs, in headless Chromium."""

from __future__ import annotations

import asyncio
import json
import shutil
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bench import Bench, eventually

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.pipeline.operations.health import HealthServer
from nanovllm.pipeline.worker import Worker
from nanovllm.pipeline.worker_status import worker_status
from nanovllm.settings.worker import HttpSettings

HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)")


@asynccontextmanager
async def served(bench: Bench, engine: EchoEngine, **settings: Any) -> AsyncIterator[tuple[Worker, str]]:
    """A worker at work, and the address of its status page."""
    async with engine, bench.working(engine, **settings) as (worker, _):
        server = HealthServer(bench.health, bench.metrics, host="127.0.0.1", port=0)
        server.status = partial(worker_status, worker)
        bench.health.is_model_loaded = True
        server.start()
        try:
            yield worker, f"http://127.0.0.1:{server.port}"
        finally:
            server.close()


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
    from nanovllm.metrics import Metrics
    from nanovllm.pipeline.operations.health import Health

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


async def rendered(url: str, folder: Path, *, size: str, picture: Path | None = None) -> tuple[str, str]:
    """The page's DOM after some seconds, and what the browser logged."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    options += [f"--user-data-dir={folder}", f"--window-size={size}", "--enable-logging=stderr", "--v=0"]
    options += ["--virtual-time-budget=5000", "--dump-dom" if picture is None else f"--screenshot={picture}"]
    browser = await asyncio.create_subprocess_exec(
        CHROMIUM, *options, url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(browser.communicate(), 120)
    return out.decode(), err.decode()


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("size", ["1280,900", "390,844"])
async def test_the_page_shows_jobs_as_they_end_and_hostile_names_as_text(
    bench: Bench, tmp_path: Path, size: str
) -> None:
    async with served(bench, EchoEngine()) as (worker, url):
        before, _ = await rendered(url, tmp_path / "a", size=size)
        assert "No job has ended." in before
        await bench.send({"job_id": HOSTILE, "prompt": "a"}, {"job_id": "second", "prompt": "b"})
        await bench.results(2)
        await eventually(lambda: len(worker.recent.last(9)) == 2)
        after, log = await rendered(url, tmp_path / "b", size=size)
    assert "second" in after
    assert "&lt;img src=x onerror" in after
    assert "<img" not in after
    assert "<title>taken" not in after
    assert f"<title>{worker.settings.worker_id}</title>" in after
    assert "CONSOLE" not in log, log
