"""Connections to the object store are shared by tenant: slow objects of one keep no other's job waiting."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from bench import Bench, eventually, png, reached
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.objects.s3_client import make_reading_client
from nanovllm.pipeline.admission.admission import Admission
from nanovllm.pipeline.admission.fetch_shares import TIMES_FREE, FetchShares
from nanovllm.settings.s3 import S3Settings
from nanovllm.settings.tenants import TenantSettings

MIB = 2**20


class SlowObjects:
    """A client of S3 that gets objects whose keys begin with ``slow`` only when ``opened``; each keeps its thread."""

    def __init__(self, settings: S3Settings) -> None:
        self._client = make_reading_client(settings)
        self.opened = threading.Event()
        self.slow = 0

    def get_object(self, **request: Any) -> Any:
        if request["Key"].startswith("slow"):
            self.slow += 1
            self.opened.wait(60)
        return self._client.get_object(**request)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


@pytest.mark.parametrize("images_each", [1, 6], ids=["one object", "more objects than connections"])
async def test_slow_objects_of_one_tenant_hold_no_other_tenants_jobs(
    bench: Bench, images: Callable[[str, bytes], str], images_each: int
) -> None:
    # Four connections, bytes for five objects with their pixels, a window of four jobs: one tenant could take any.
    s3 = bench.settings.s3.model_copy(update={"max_connections": 4, "allow": ("s3://images",)})
    pictures = bench.settings.images.model_copy(update={"max_bytes": MIB})
    admission = bench.settings.admission.model_copy(update={"max_jobs": 4, "max_bytes": 7 * MIB})
    objects = SlowObjects(s3)
    fetcher = ObjectFetcher(s3, max_bytes=MIB, client_factory=lambda _: objects)
    tenants = TenantSettings(header="tenant")
    prompt = "<|image|>" * images_each
    try:
        for number in range(20):
            uris = [images(f"slow-{number}-{image}.png", png()) for image in range(images_each)]
            job = {"job_id": f"slow-{number}", "prompt": prompt, "images": uris}
            await bench.send(job, headers=[("tenant", b"slow")])
        async with bench.working(EchoEngine(), fetcher, s3=s3, images=pictures, admission=admission, tenants=tenants):
            await eventually(lambda: objects.slow >= 3)
            for number in range(10):
                job = {"job_id": f"quick-{number}", "prompt": "<|image|>", "images": [images("quick.png", png())]}
                await bench.send(job, headers=[("tenant", b"quick")])
            assert set(await bench.results(10)) == {f"quick-{number}" for number in range(10)}
            assert objects.slow == 3, "three quarters of the connections"
            objects.opened.set()
            assert len(await bench.results(30)) == 30
            await eventually(lambda: reached(bench, 30))
    finally:
        objects.opened.set()


@asynccontextmanager
async def held_by(shares: FetchShares, tenant: str, wanted: int, lane: int) -> AsyncIterator[int]:
    """Connections that a job of its own holds inside; how many."""
    reservation = Admission(max_jobs=1, max_bytes=1).admit(0)
    granted = await shares.take(tenant, wanted, lane, reservation)
    try:
        yield granted
    finally:
        shares.give_back(tenant, granted)


@given(
    connections=st.integers(1, 20),
    jobs=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 8), st.integers(0, 2), st.booleans()), min_size=1, max_size=40
    ),
)
async def test_no_tenant_takes_more_than_its_share_and_every_job_gets_a_turn(
    connections: int, jobs: list[tuple[str, int, int, bool]]
) -> None:
    shares, held, served = FetchShares(connections, 1), Counter[str](), 0

    async def work(tenant: str, wanted: int, lane: int) -> None:
        nonlocal served
        async with held_by(shares, tenant, wanted, lane) as granted:
            assert 1 <= granted <= wanted
            held[tenant] += granted
            free = connections - held.total()
            assert free >= 0
            assert held[tenant] <= max(TIMES_FREE * free, 1)
            try:
                await asyncio.sleep(0)
            finally:
                held[tenant] -= granted
        served += 1

    tasks = [asyncio.create_task(work(tenant, wanted, lane)) for tenant, wanted, lane, _ in jobs]
    await asyncio.sleep(0)
    for task, (*_, is_cancelled) in zip(tasks, jobs, strict=True):
        if is_cancelled:
            task.cancel()
    async with asyncio.timeout(30):
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(error is None or isinstance(error, asyncio.CancelledError) for error in ended)
    assert served == sum(error is None for error in ended)
    assert shares._free == connections
    assert not shares._held
    assert not shares._waiting


async def test_a_tenant_that_holds_nothing_goes_first_then_the_one_with_the_fewest() -> None:
    shares, order = FetchShares(4, 1), list[str]()
    leave = {name: asyncio.Event() for name in ("a1", "a2", "a3", "b1")}

    async def work(name: str, lane: int = 0) -> None:
        async with held_by(shares, name[0], 1, lane):
            order.append(name)
            if name in leave:
                await leave[name].wait()

    async def begin(*names: str, lane: int = 0) -> None:
        tasks.extend(asyncio.create_task(work(name, lane)) for name in names)
        await asyncio.sleep(0.01)

    tasks: list[asyncio.Task[None]] = []
    await begin("a1", "a2", "a3", "a4", "b1")
    assert order == ["a1", "a2", "a3", "b1"], "three for a tenant alone, and one is there for the next"
    await begin("b2", "c1")
    await begin("a5", lane=-1)
    leave["a1"].set()
    await asyncio.sleep(0.01)
    assert order[4] == "c1"
    for event in leave.values():
        event.set()
    await asyncio.gather(*tasks)
    assert order.index("a5") < order.index("a4"), "the more urgent lane of a tenant"
