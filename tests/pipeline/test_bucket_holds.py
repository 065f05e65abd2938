"""A bucket in which everything is refused: its jobs wait, other buckets go on, and readiness says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from bench import Bench, eventually, png, reached

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import ObjectForbidden, ObjectNotFound, ObjectUnavailable
from nanovllm.messages.job import ImageRef
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.pipeline.failure import bucket_holds
from nanovllm.pipeline.failure.bucket_holds import PROBE_INTERVAL_S, REFUSED_OBJECTS, BucketHolds
from nanovllm.settings.s3 import S3Settings

FORBIDDEN = ObjectForbidden("the object store answered 403 AccessDenied")


class RefusingStore(ObjectFetcher):
    """Refuses the objects of the bucket ``closed`` whose keys are ``refused``, until ``heal``."""

    def __init__(
        self, settings: S3Settings, error: Exception = FORBIDDEN, refused: Callable[[str], bool] = lambda _: True
    ) -> None:
        super().__init__(settings, max_bytes=100_000)
        self.refused = refused
        self.error: Exception | None = error
        self.asked = 0

    def heal(self) -> None:
        self.error = None

    async def fetch(self, ref: Any, **held: Any) -> Any:
        bucket, key = ref.bucket_and_key
        if self.error is not None and bucket == "closed" and self.refused(key):
            self.asked += 1
            raise self.error
        return await super().fetch(ref, **held)


@pytest.fixture
def closed(s3: Any) -> Callable[[str], str]:
    """Stores an image in the bucket that will be refused."""
    if "closed" not in {bucket["Name"] for bucket in s3.client.list_buckets()["Buckets"]}:
        s3.client.create_bucket(Bucket="closed")
    return lambda key: s3.put("closed", key, png())


def job(job_id: str, uri: str) -> dict[str, Any]:
    return {"job_id": job_id, "prompt": "<|image|>", "images": [uri]}


@pytest.mark.parametrize(
    "error", [FORBIDDEN, ObjectUnavailable("the object store answered 301 PermanentRedirect")], ids=["403", "301"]
)
async def test_a_bucket_that_refuses_everything_is_held_back_and_others_go_on(
    bench: Bench,
    images: Callable[[str, bytes], str],
    closed: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    monkeypatch.setattr(bucket_holds, "PROBE_INTERVAL_S", 0.5)
    s3 = bench.settings.s3.model_copy(update={"allow": ("s3://images", "s3://closed"), "max_attempts": 1})
    # Room for a few of them only, by jobs and by bytes: what waits must not hold it.
    admission = bench.settings.admission.model_copy(update={"max_jobs": 4, "max_bytes": 1_000_000})
    store = RefusingStore(s3, error)
    for number in range(60):
        await bench.send(job(f"closed-{number}", closed(f"{number}.png")), partition=0)
    async with bench.working(EchoEngine(), store, s3=s3, admission=admission):
        await eventually(lambda: any("s3://closed is held back" in reason for reason in bench.health.unready))
        for number in range(10):
            await bench.send(job(f"open-{number}", images(f"open-{number}.png", png())), partition=1)
        assert set(await bench.results(10)) == {f"open-{number}" for number in range(10)}
        asked = store.asked
        await asyncio.sleep(2.0)
        assert store.asked - asked <= 6, "one probe at a time"
        store.heal()
        dead = REFUSED_OBJECTS - 1
        assert len(await bench.results(10 + 60 - dead)) == 70 - dead
        await eventually(lambda: not bench.health.held_buckets)
        await eventually(lambda: reached(bench, 60))
    assert len(await bench.dead_letters(dead)) == dead


async def test_a_job_of_a_held_bucket_waits_until_its_deadline(
    bench: Bench, closed: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_holds, "REFUSED_OBJECTS", 1)
    s3 = bench.settings.s3.model_copy(update={"allow": ("s3://closed",)})
    admission = bench.settings.admission.model_copy(update={"ttl_s": 3.0})
    await bench.send(job("late", closed("late.png")))
    async with bench.working(EchoEngine(), RefusingStore(s3), s3=s3, admission=admission):
        ((headers, _),) = await bench.dead_letters(1)
    assert headers["nanovllm_code"] == "deadline_exceeded"


async def test_a_tenant_whose_objects_are_refused_holds_up_no_other(
    bench: Bench, closed: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = bench.settings.s3.model_copy(update={"allow": ("s3://closed",), "max_attempts": 1})
    tenants = bench.settings.tenants.model_copy(update={"header": "tenant"})
    evil, good = 3 * REFUSED_OBJECTS, 15
    uris = [closed(f"evil/{number}.png") for number in range(evil)]
    for number, uri in enumerate(uris):
        await bench.send(job(f"evil-{number}", uri), partition=0, headers=[("tenant", b"evil")])
    store = RefusingStore(s3, refused=lambda key: key.startswith("evil/"))
    async with bench.working(EchoEngine(), store, s3=s3, tenants=tenants):
        bench.health.is_model_loaded = True
        await eventually(lambda: any("tenant 'evil'" in reason for reason in bench.health.held_tenants))
        assert bench.health.held_tenants[0] in bench.health.unready, "nothing was answered yet"
        for number in range(good):
            uri = closed(f"good/{number}.png")
            await bench.send(job(f"good-{number}", uri), partition=1, headers=[("tenant", b"good")])
        assert set(await bench.results(good)) == {f"good-{number}" for number in range(good)}
        assert bench.health.held_tenants, "evil's jobs wait"
        await eventually(lambda: not bench.health.unready)
        assert bench.health.notes == bench.health.held_tenants
        store.heal()
        assert len(await bench.results(good + evil - REFUSED_OBJECTS + 1)) == good + evil - REFUSED_OBJECTS + 1
        await eventually(lambda: not bench.health.held_tenants)


def holds() -> tuple[BucketHolds, list[tuple[str, ...]]]:
    told: list[tuple[str, ...]] = []
    return BucketHolds(lambda from_all, from_tenants: told.append((*from_all, *from_tenants))), told


def test_a_few_refused_objects_among_readable_ones_hold_nothing() -> None:
    buckets, told = holds()
    for number in range(200):
        buckets.refused("s3://b", f"k{number}", FORBIDDEN)
        if number % (REFUSED_OBJECTS - 1) == 0:
            buckets.answered("s3://b")
    assert not told


def test_one_object_asked_for_again_and_again_holds_nothing_nor_do_different_reasons() -> None:
    buckets, told = holds()
    for _ in range(100):
        buckets.refused("s3://b", "same", FORBIDDEN)
    for number in range(100):
        buckets.refused("s3://b", f"k{number}", ObjectUnavailable(f"reason {number % 2}"))
    assert not told


async def test_while_a_bucket_is_held_one_caller_asks_at_each_interval() -> None:
    now = 0.0
    told: list[tuple[str, ...]] = []
    buckets = BucketHolds(lambda from_all, _: told.append(from_all), clock=lambda: now)
    for number in range(REFUSED_OBJECTS):
        buckets.refused("s3://b", f"k{number}", FORBIDDEN)
    assert told == [("s3://b is held back: the object store answered 403 AccessDenied",)]
    await buckets.wait(["other"])
    now = PROBE_INTERVAL_S
    await buckets.wait(["s3://b"])  # the probe
    waiting = [asyncio.create_task(buckets.wait(["s3://b"])) for _ in range(5)]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in waiting)
    buckets.answered("s3://b")
    await asyncio.wait_for(asyncio.gather(*waiting), 5)
    assert told[-1] == ()


def test_versions_of_one_object_hold_nothing_back() -> None:
    buckets, told = holds()
    error = FORBIDDEN

    class Refusing:
        async def fetch(self, ref: Any, **held: Any) -> Any:
            raise error

        check = checked = None

    watched = bucket_holds.WatchedFetcher(Refusing(), buckets)  # type: ignore[arg-type]
    for number in range(2 * REFUSED_OBJECTS):
        for ref in (
            ImageRef(uri="s3://bucket/k", version_id=f"{number}"),
            ImageRef(uri="s3://bucket/k", etag=f"{number}"),
        ):
            with pytest.raises(ObjectForbidden):
                asyncio.run(watched.fetch(ref))
    assert not told


def test_what_one_tenant_is_refused_holds_no_other() -> None:
    buckets, told = holds()
    for number in range(3 * REFUSED_OBJECTS):
        buckets.refused("s3://b", f"k{number}", FORBIDDEN, "evil")
    assert buckets.is_held("s3://b", "evil")
    assert not buckets.is_held("s3://b", "good")
    assert told[-1] == (
        "s3://b is held back from the jobs of tenant 'evil': the object store answered 403 AccessDenied",
    )
    buckets.answered("s3://b", "good")
    assert buckets.is_held("s3://b", "evil"), "another tenant's objects say nothing of these"
    assert not buckets.refused("s3://b", "one", FORBIDDEN, "good"), "one forbidden object among readable ones"
    buckets.answered("s3://b", "evil")
    assert not buckets.is_held("s3://b", "evil")
    assert not told[-1]


def test_a_bucket_that_refuses_all_tenants_costs_each_one_object() -> None:
    buckets, _ = holds()
    tenants = range(2 * REFUSED_OBJECTS)
    held = [buckets.refused("s3://b", f"k{number}", FORBIDDEN, f"tenant {number}") for number in tenants]
    assert held == [False] * (REFUSED_OBJECTS - 1) + [True] * (REFUSED_OBJECTS + 1)
    buckets.answered("s3://b", "tenant 7")
    assert not any(buckets.is_held("s3://b", f"tenant {number}") for number in range(2 * REFUSED_OBJECTS))


def test_what_is_remembered_of_tenants_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_holds, "MAX_TENANTS", 5)
    buckets, told = holds()
    for tenant in range(10):
        for number in range(REFUSED_OBJECTS):
            buckets.refused("s3://b", f"{tenant}/{number}", FORBIDDEN, f"tenant {tenant}")
    assert [buckets.is_held("s3://b", f"tenant {tenant}") for tenant in range(10)] == [False] * 5 + [True] * 5
    assert len(told[-1]) == 5


async def test_what_concerns_one_object_ends_the_hold() -> None:
    buckets, told = holds()
    for number in range(REFUSED_OBJECTS):
        buckets.refused("s3://bucket", f"k{number}", FORBIDDEN)

    class Missing:
        async def fetch(self, ref: Any, **held: Any) -> Any:
            raise ObjectNotFound("404")

        check = checked = None

    watched = bucket_holds.WatchedFetcher(Missing(), buckets)  # type: ignore[arg-type]
    with pytest.raises(ObjectNotFound):
        await watched.fetch(ImageRef(uri="s3://bucket/k"))
    assert told[-1] == ()
