from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from bench import Bench, GatedEngine, job_id_of, png, watched
from hypothesis import given
from hypothesis import strategies as st
from parts import eventually

from nanovllm.engine.backends.base import Generation
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import ForbiddenUri, ObjectChanged, ObjectNotFound
from nanovllm.messages.job import ImageRef
from nanovllm.metrics import Metrics
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.objects.s3_client import make_client
from nanovllm.pipeline.stages.caches import ENTRY_BYTES, ImageCache, SingleFlightCache
from nanovllm.pipeline.stages.infer import ReuseResponses
from nanovllm.pipeline.worker import Worker
from nanovllm.settings.images import ReuseSettings
from nanovllm.settings.s3 import S3Settings
from nanovllm.settings.worker import TenantSettings
from nanovllm.vision.images.pool import DecoderPool
from nanovllm.vision.images.preprocess import ImageTransform, PreparedImage

KEYS = "abcd"
OPERATIONS = st.lists(st.tuples(st.sampled_from(KEYS), st.integers(0, 6), st.booleans()), max_size=40)


@given(OPERATIONS, st.integers(0, 12))
def test_shared_work_does_what_a_plain_model_does(operations: list[tuple[str, int, bool]], bound: int) -> None:
    """``operations``: key, size, whether making it fails; one after the other against a list in order of use."""

    async def check() -> None:
        bytes_bound = bound + 2 * ENTRY_BYTES  # room for two
        work = SingleFlightCache(bytes_bound)
        model: list[tuple[str, int, int]] = []  # key, value, size; the last was used last
        for number, (key, size, fails) in enumerate(operations):

            async def make(number: int = number, size: int = size, fails: bool = fails) -> tuple[int, int]:
                if fails:
                    raise OSError(f"{number}")
                return number, size

            kept = next((entry for entry in model if entry[0] == key), None)
            if kept is None and fails:
                with pytest.raises(OSError, match=str(number)):
                    await work.get(key, make)
                continue
            value, reuse = await work.get(key, make)
            if kept is not None:
                assert (value, reuse) == (kept[1], "hit")
                model.remove(kept)
                model.append(kept)
            else:
                assert (value, reuse) == (number, "miss")
                model.append((key, number, size + ENTRY_BYTES))
                while sum(entry[2] for entry in model) > bytes_bound:
                    model.pop(0)
            assert work.bytes == sum(entry[2] for entry in model) <= bytes_bound
        for key in KEYS:
            assert work.peek(key) == next((entry[1] for entry in model if entry[0] == key), None)

    asyncio.run(check())


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_nothing_is_made_twice_at_the_same_time(calls: list[tuple[str, int, int]]) -> None:
    """``calls``: key, when it is asked for, how long making it takes, in turns of the event loop; nothing is kept."""

    async def check() -> None:
        work, under_way, started = SingleFlightCache(0), set[str](), list[str]()

        async def ask(key: str, begin: int, turns: int) -> tuple[str, str]:
            async def make() -> tuple[str, int]:
                assert key not in under_way
                under_way.add(key)
                started.append(key)
                for _ in range(turns):
                    await asyncio.sleep(0)
                under_way.remove(key)
                return key, 1

            for _ in range(begin):
                await asyncio.sleep(0)
            return await work.get(key, make)

        answers = await asyncio.gather(*(ask(*call) for call in calls))
        assert [value for value, _ in answers] == [key for key, _, _ in calls]
        assert [reuse for _, reuse in answers].count("miss") == len(started)
        assert work.bytes == 0

    asyncio.run(check())


async def test_a_failure_goes_to_all_who_wait_and_the_next_one_tries_again() -> None:
    work, gate, tries = SingleFlightCache(10), asyncio.Event(), []

    async def make() -> tuple[str, int]:
        tries.append(len(tries))
        await gate.wait()
        if len(tries) == 1:
            raise OSError("broken")
        return "made", 1

    waiting = [asyncio.create_task(work.get("key", make)) for _ in range(3)]
    await asyncio.sleep(0)
    gate.set()
    failures = await asyncio.gather(*waiting, return_exceptions=True)
    assert [str(failure) for failure in failures] == ["broken"] * 3
    assert (await work.get("key", make), len(tries)) == (("made", "miss"), 2)


async def test_who_goes_away_leaves_the_work_to_those_who_wait() -> None:
    work, gate = SingleFlightCache(10), asyncio.Event()

    async def make() -> tuple[str, int]:
        await gate.wait()
        return "made", 1

    first, second = [asyncio.create_task(work.get("key", make)) for _ in range(2)]
    await asyncio.sleep(0)
    first.cancel()
    gate.set()
    assert await second == ("made", "joined")
    assert first.cancelled()


async def test_work_that_nobody_waits_for_ends_and_is_begun_anew_by_the_next_one() -> None:
    work, gate, ended = SingleFlightCache(10), asyncio.Event(), []

    async def make() -> tuple[str, int]:
        try:
            await gate.wait()
        finally:
            ended.append(gate.is_set())
        return "made", 1

    only = asyncio.create_task(work.get("key", make))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    only.cancel()
    late = asyncio.create_task(work.get("key", make))
    await asyncio.gather(only, return_exceptions=True)
    gate.set()
    assert (await late, ended) == (("made", "miss"), [False, True])


def nothing_known(file_digest: bytes, salt: bytes) -> PreparedImage | None:
    return None


class Store:
    """A bucket, and an image reuse on it that counts its requests."""

    def __init__(self, s3: Any, *, versioned: bool = False, max_bytes: int = 10_000) -> None:
        self.s3, self.bucket = s3, s3.make_bucket(versioned=versioned)
        self.metrics = Metrics()
        self.requests: list[dict[str, Any]] = []
        self.has_read: Callable[[], None] = lambda: None
        settings = S3Settings(endpoint_url=s3.endpoint_url, allow=(f"s3://{self.bucket}",), addressing_style="path")
        self.fetcher = ObjectFetcher(settings, max_bytes=10_000, client_factory=self._client)
        self.images = ImageCache(
            watched(self.fetcher),
            None,
            nothing_known,
            self.metrics,
            max_bytes=max_bytes,
        )

    def put(self, body: bytes, key: str = "k") -> str | None:
        version: str | None = self.s3.client.put_object(Bucket=self.bucket, Key=key, Body=body).get("VersionId")
        return version

    def ref(self, key: str = "k", **promises: Any) -> ImageRef:
        return ImageRef(uri=f"s3://{self.bucket}/{key}", **promises)

    async def read(self, ref: ImageRef | None = None, salt: bytes = b"", **options: Any) -> bytes:
        return (await self.images.fetch(ref or self.ref(), salt, **options)).data

    @property
    def downloads(self) -> int:
        return int(self.metrics.fetched_objects._value.get())

    def reused(self, reuse: str) -> int:
        return int(self.metrics.reuse.labels("fetch", reuse)._value.get())

    def _client(self, settings: S3Settings) -> Any:
        store, client = self, make_client(settings)

        class Counted:
            def get_object(self, **request: Any) -> Any:
                store.requests.append(request)
                try:
                    return client.get_object(**request)
                finally:
                    store.has_read()

            def close(self) -> None:
                client.close()

        return Counted()


async def test_an_object_of_no_version_is_downloaded_once_and_asked_for_each_time(s3: Any) -> None:
    store = Store(s3)
    store.put(b"bytes")
    assert [await store.read() for _ in range(3)] == [b"bytes"] * 3
    assert (store.downloads, len(store.requests), store.reused("hit")) == (1, 3, 2)
    assert all("IfNoneMatch" in request for request in store.requests[1:])


async def test_a_replaced_object_is_read_anew(s3: Any) -> None:
    store = Store(s3)
    store.put(b"first")
    await store.read()
    store.put(b"second")
    assert [await store.read(), await store.read()] == [b"second", b"second"]
    assert (store.downloads, store.reused("hit")) == (2, 1)
    store.s3.client.delete_object(Bucket=store.bucket, Key="k")
    with pytest.raises(ObjectNotFound):
        await store.read()


async def test_a_known_version_is_asked_for_once_and_for_all(s3: Any) -> None:
    store = Store(s3, versioned=True)
    first = store.put(b"first")
    store.put(b"second")
    old = store.ref(version_id=first)
    assert [await store.read(old) for _ in range(3)] == [b"first"] * 3
    assert len(store.requests) == 1
    assert await store.read() == b"second"


async def test_equal_objects_under_way_are_downloaded_once(s3: Any) -> None:
    store = Store(s3)
    store.put(b"bytes")
    assert await asyncio.gather(*(store.read() for _ in range(5))) == [b"bytes"] * 5
    assert (store.downloads, store.reused("miss"), store.reused("joined")) == (1, 1, 4)


@pytest.mark.parametrize("before", [b"first", None], ids=["another object", "no object"])
async def test_nobody_joins_a_download_across_a_change(s3: Any, before: bytes | None) -> None:
    store = Store(s3)
    if before is not None:
        store.put(before)
    was_read, go_on = threading.Event(), threading.Event()

    def stand_still() -> None:
        store.has_read = lambda: None
        was_read.set()
        go_on.wait(30)

    store.has_read = stand_still
    early = asyncio.create_task(store.read())
    await asyncio.to_thread(was_read.wait, 30)
    store.put(b"second")
    late = asyncio.create_task(store.read())
    await asyncio.sleep(0.01)
    go_on.set()
    if before is None:
        with pytest.raises(ObjectNotFound):
            await early
    else:
        assert await early == before
    assert await late == b"second"


async def test_a_promise_binds_the_job_that_makes_it_and_nobody_else(s3: Any) -> None:
    store = Store(s3)
    store.put(b"bytes")
    liar = store.ref(sha256=hashlib.sha256(b"other").hexdigest())
    honest = store.ref(sha256=hashlib.sha256(b"bytes").hexdigest())
    answers = await asyncio.gather(store.read(liar), store.read(honest), store.read(), return_exceptions=True)
    assert isinstance(answers[0], ObjectChanged)
    assert (answers[1:], store.downloads) == ([b"bytes", b"bytes"], 1)


async def test_what_may_not_be_read_is_refused_though_it_is_at_hand(s3: Any) -> None:
    store = Store(s3)
    store.put(b"bytes")
    await store.read()
    store.fetcher._allow = type(store.fetcher._allow)()
    with pytest.raises(ForbiddenUri):
        await store.read()


async def test_tenants_share_nothing_and_a_job_may_ask_for_a_fresh_copy(s3: Any) -> None:
    store = Store(s3)
    store.put(b"bytes")
    await store.read(salt=b"one")
    await store.read(salt=b"two")
    assert store.downloads == 2
    await store.read(salt=b"one", may_reuse=False)
    assert store.downloads == 3
    assert "IfNoneMatch" not in store.requests[-1]


async def test_what_is_larger_than_the_memory_is_used_and_not_kept(s3: Any) -> None:
    store = Store(s3, max_bytes=ENTRY_BYTES + 200)  # with the key, whose bytes count too
    large = bytes(300)
    store.put(b"small", "small")
    store.put(large, "large")
    await store.read(store.ref("small"))
    assert await store.read(store.ref("large")) == large
    await store.read(store.ref("large"))
    await store.read(store.ref("small"))
    assert (store.downloads, store.reused("hit")) == (3, 1)


async def test_equal_bytes_are_decoded_once(s3: Any) -> None:
    store, data = Store(s3), png()
    async with asyncio.timeout(60):
        decoders = DecoderPool(ImageTransform(size=(8, 8)), workers=1)
        await decoders.start()
        try:
            images = ImageCache(
                watched(store.fetcher),
                decoders,
                nothing_known,
                store.metrics,
                max_bytes=1_000_000,
            )
            fetched = [await images.fetch(ImageRef(data=data), b"") for _ in range(2)]
            first, second = [await images.prepare(image, b"") for image in fetched]
            assert first is second
            assert await images.prepare(fetched[0], b"other tenant") is not first
            assert await images.prepare(fetched[0], b"", may_reuse=False) is not first
        finally:
            await decoders.close()
    assert store.metrics.reuse.labels("prepare", "hit")._value.get() == 1


async def test_what_the_engine_has_embedded_is_not_decoded(s3: Any) -> None:
    store, asked = Store(s3), []
    known = PreparedImage(None, bytes(32), 4, 3, (8, 8))

    def find(file_digest: bytes, salt: bytes) -> PreparedImage | None:
        asked.append((file_digest, salt))
        return known

    store.put(b"a picture")
    images = ImageCache(
        watched(store.fetcher),
        cast("DecoderPool", object()),
        find,
        store.metrics,
        max_bytes=1_000,
    )
    fetched = await images.fetch(store.ref("k"), b"tenant")
    assert await images.prepare(fetched, b"tenant") is known
    assert asked == [(hashlib.sha256(b"a picture").digest(), b"tenant")]
    assert store.metrics.registry.get_sample_value("nanovllm_reuse_total", {"stage": "prepare", "reuse": "hit"}) == 1


@pytest.mark.s3
async def test_a_real_store_says_that_nothing_has_changed(versity_s3: Any) -> None:
    store = Store(versity_s3)
    store.put(b"bytes", "a b/50+ü &%日本.png")
    ref = store.ref("a b/50+ü &%日本.png")
    assert [await store.read(ref) for _ in range(3)] == [b"bytes"] * 3
    assert (store.downloads, store.reused("hit")) == (1, 2)
    store.put(b"other", "a b/50+ü &%日本.png")
    assert await store.read(ref) == b"other"


ANSWERS = ReuseSettings(level="answers")


async def test_equal_greedy_jobs_are_answered_once_and_say_so(bench: Bench) -> None:
    engine = GatedEngine()
    async with bench.working(engine, reuse=ANSWERS) as (worker, _):
        await bench.send(*({"job_id": name, "prompt": "p", "metadata": {"of": name}} for name in ("a", "b")))
        await eventually(lambda: waiting_for_an_answer(worker) == 2)
        leader = job_id_of(engine.requests[0])
        engine.open(leader)
        results = await bench.results(2)
        await bench.send({"job_id": "c", "prompt": "p"})
        results = await bench.results(3)
        await bench.send({"job_id": "d", "prompt": "another"})
        engine.open("d")
        results |= {"d": (await bench.results(4))["d"]}
        metrics = {
            record.key.decode(): json.loads(record.value)
            for record in await bench.read(bench.settings.topics.metrics, 4)
        }
    follower = ({"a", "b"} - {leader}).pop()
    assert [job_id_of(request) for request in engine.requests] == [leader, "d"]
    reused = {name: result.get("reused") for name, result in results.items()}
    assert reused == {leader: None, follower: "joined", "c": "hit", "d": None}
    assert {results[name]["text"] for name in ("a", "b", "c")} == {"p"}
    assert results[follower]["metadata"] == {"of": follower}
    assert results["c"]["timings_ms"]["generation"] == 0
    assert metrics["c"]["reused"] == "hit"
    assert 'nanovllm_request_success_total{finished_reason="stop"} 2.0' in bench.metrics.exposition().decode()


@pytest.mark.parametrize(
    ("level", "job"),
    [
        ("images", {}),
        ("answers", {"reuse": "none"}),
        ("answers", {"reuse": "images"}),
        ("answers", {"sampling": {"temperature": 1.0}}),
    ],
    ids=["by default", "the job wants none", "the job wants images only", "chance decides"],
)
async def test_answers_are_not_reused(bench: Bench, level: str, job: dict[str, Any]) -> None:
    engine = CountingEngine()
    async with bench.working(engine, reuse=ReuseSettings(level=level)):
        await bench.send(*({"job_id": name, "prompt": "p", **job} for name in "ab"))
        results = await bench.results(2)
    assert engine.answered == 2
    assert [result.get("reused") for result in results.values()] == [None, None]


async def test_a_job_may_ask_for_an_answer_at_hand_where_the_worker_keeps_any(bench: Bench) -> None:
    engine = CountingEngine()
    async with bench.working(engine, reuse=ReuseSettings()):
        await bench.send(*({"job_id": name, "prompt": "p", "reuse": "answers"} for name in "ab"))
        await bench.results(2)
    assert engine.answered == 1
    async with bench.working(engine, reuse=ReuseSettings(answer_bytes=0)):
        await bench.send(*({"job_id": name, "prompt": "p", "reuse": "answers"} for name in "cd"))
        await bench.results(4)
    assert engine.answered == 3


async def test_an_answer_depends_on_prompt_images_parameters_and_tenant(
    bench: Bench, images: Callable[[str, bytes], str]
) -> None:
    red, also_red, blue = (images(key, png(color)) for key, color in (("a", "red"), ("b", "red"), ("c", "blue")))
    engine = CountingEngine()
    tenants = TenantSettings(header="tenant")
    async with bench.working(engine, reuse=ANSWERS, tenants=tenants):
        looks = {"prompt": "<|image|>"}
        jobs = [
            {**looks, "images": [red]},
            {**looks, "images": [also_red]},  # the same pixels elsewhere: the one that is reused
            {**looks, "images": [blue]},
            {**looks, "images": [red], "sampling": {"max_tokens": 1}},
            {"prompt": "see <|image|>", "images": [red]},
        ]
        await bench.send(*({"job_id": str(number), **job} for number, job in enumerate(jobs)))
        await bench.send({"job_id": "theirs", **jobs[0]}, headers=[("tenant", b"other")])
        await bench.results(6)
    assert engine.answered == 5


async def test_a_deadline_of_one_takes_the_answer_from_nobody_else(bench: Bench) -> None:
    engine = GatedEngine()
    async with bench.working(engine, reuse=ANSWERS) as (worker, _):
        deadline = (datetime.now(UTC) + timedelta(seconds=10)).isoformat()
        await bench.send({"job_id": "short", "prompt": "p", "deadline": deadline})
        await engine.submitted("short")
        await bench.send({"job_id": "patient", "prompt": "p"})
        await eventually(lambda: waiting_for_an_answer(worker) == 2)
        ((headers, _),) = await bench.dead_letters(1)
        assert headers["nanovllm_code"] == "deadline_exceeded"
        engine.open("short")
        assert (await bench.results(1))["patient"]["reused"] == "joined"


def waiting_for_an_answer(worker: Worker) -> int:
    reuse: Any = worker.stages.infer
    while not isinstance(reuse, ReuseResponses):
        reuse = reuse._infer
    return sum(flight.waiting for flight in reuse._cache._flights.values())


class CountingEngine(EchoEngine):
    def __init__(self) -> None:
        super().__init__()
        self.answered = 0

    def submit(self, request: Any) -> Generation:
        self.answered += 1
        return super().submit(request)


async def test_the_bytes_of_keys_are_bounded_too() -> None:
    cache = SingleFlightCache(100_000)

    async def nothing() -> tuple[None, int]:
        return None, 0

    for number in range(1_000):
        await cache.get(("object", b"tenant", f"s3://bucket/{number:01000}"), nothing)
    assert cache.bytes <= 100_000
    assert len(cache._kept) < 100
