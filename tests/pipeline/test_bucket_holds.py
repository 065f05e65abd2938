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
    """Refuses every object whose key begins with ``refused``, until ``heal``."""

    def __init__(self, settings: S3Settings, error: Exception = FORBIDDEN) -> None:
        super().__init__(settings, max_bytes=100_000)
        self.error: Exception | None = error
        self.asked = 0

    def heal(self) -> None:
        self.error = None

    async def fetch(self, ref: Any, **held: Any) -> Any:
        if self.error is not None and ref.bucket_and_key[0] == "closed":
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


def holds() -> tuple[BucketHolds, list[tuple[str, ...]]]:
    told: list[tuple[str, ...]] = []
    return BucketHolds(told.append), told


def test_a_few_refused_objects_among_readable_ones_hold_nothing() -> None:
    buckets, told = holds()
    for number in range(200):
        buckets.refused("b", f"k{number}", FORBIDDEN)
        if number % (REFUSED_OBJECTS - 1) == 0:
            buckets.answered("b")
    assert not told


def test_one_object_asked_for_again_and_again_holds_nothing_nor_do_different_reasons() -> None:
    buckets, told = holds()
    for _ in range(100):
        buckets.refused("b", "same", FORBIDDEN)
    for number in range(100):
        buckets.refused("b", f"k{number}", ObjectUnavailable(f"reason {number % 2}"))
    assert not told


async def test_while_a_bucket_is_held_one_caller_asks_at_each_interval() -> None:
    now = 0.0
    told: list[tuple[str, ...]] = []
    buckets = BucketHolds(told.append, clock=lambda: now)
    for number in range(REFUSED_OBJECTS):
        buckets.refused("b", f"k{number}", FORBIDDEN)
    assert told == [("s3://b is held back: the object store answered 403 AccessDenied",)]
    await buckets.wait(["other"])
    now = PROBE_INTERVAL_S
    await buckets.wait(["b"])  # the probe
    waiting = [asyncio.create_task(buckets.wait(["b"])) for _ in range(5)]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in waiting)
    buckets.answered("b")
    await asyncio.wait_for(asyncio.gather(*waiting), 5)
    assert told[-1] == ()


async def test_what_concerns_one_object_ends_the_hold() -> None:
    buckets, told = holds()
    for number in range(REFUSED_OBJECTS):
        buckets.refused("bucket", f"k{number}", FORBIDDEN)

    class Missing:
        async def fetch(self, ref: Any, **held: Any) -> Any:
            raise ObjectNotFound("404")

        check = checked = None

    watched = bucket_holds.WatchedFetcher(Missing(), buckets)  # type: ignore[arg-type]
    with pytest.raises(ObjectNotFound):
        await watched.fetch(ImageRef(uri="s3://bucket/k"))
    assert told[-1] == ()
