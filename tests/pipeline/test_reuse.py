from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
from bench import png
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.errors import ForbiddenUri, ObjectChanged, ObjectNotFound
from nanovllm.metrics import Metrics
from nanovllm.pipeline.fetch import ObjectFetcher, make_client
from nanovllm.pipeline.job import ImageRef
from nanovllm.pipeline.reuse import ImageReuse, SharedWork
from nanovllm.pipeline.settings import S3Settings
from nanovllm.vision.decoder_pool import DecoderPool
from nanovllm.vision.transform import ImageTransform

KEYS = "abcd"
OPERATIONS = st.lists(st.tuples(st.sampled_from(KEYS), st.integers(0, 6), st.booleans()), max_size=40)


@given(OPERATIONS, st.integers(0, 12))
def test_shared_work_does_what_a_plain_model_does(operations: list[tuple[str, int, bool]], bound: int) -> None:
    """``operations``: key, size, whether making it fails; one after the other against a list in order of use."""

    async def check() -> None:
        work, model = SharedWork(bound), list[tuple[str, int, int]]()  # key, value, size; the last was used last
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
                if size <= bound:
                    model.append((key, number, size))
                    while sum(entry[2] for entry in model) > bound:
                        model.pop(0)
            assert work.bytes == sum(entry[2] for entry in model) <= bound
        for key in KEYS:
            assert work.peek(key) == next((entry[1] for entry in model if entry[0] == key), None)

    asyncio.run(check())


@given(st.lists(st.tuples(st.sampled_from(KEYS), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_nothing_is_made_twice_at_the_same_time(calls: list[tuple[str, int, int]]) -> None:
    """``calls``: key, when it is asked for, how long making it takes, in turns of the event loop; nothing is kept."""

    async def check() -> None:
        work, under_way, started = SharedWork(0), set[str](), list[str]()

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
    work, gate, tries = SharedWork(10), asyncio.Event(), []

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
    work, gate = SharedWork(10), asyncio.Event()

    async def make() -> tuple[str, int]:
        await gate.wait()
        return "made", 1

    first, second = [asyncio.create_task(work.get("key", make)) for _ in range(2)]
    await asyncio.sleep(0)
    first.cancel()
    gate.set()
    assert await second == ("made", "joined")
    assert first.cancelled()


class Store:
    """A bucket, and an image reuse on it that counts its requests."""

    def __init__(self, s3: Any, *, versioned: bool = False, max_bytes: int = 10_000) -> None:
        self.s3, self.bucket = s3, s3.make_bucket(versioned=versioned)
        self.metrics = Metrics()
        self.requests: list[dict[str, Any]] = []
        self.has_read: Callable[[], None] = lambda: None
        settings = S3Settings(endpoint_url=s3.endpoint_url, allow=(f"s3://{self.bucket}",), addressing_style="path")
        self.fetcher = ObjectFetcher(settings, max_bytes=10_000, client_factory=self._client)
        self.images = ImageReuse(self.fetcher, None, self.metrics, max_bytes=max_bytes)

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
        return int(self.metrics.image_reuse.labels("fetch", reuse)._value.get())

    def _client(self, settings: S3Settings) -> Any:
        store, client = self, make_client(settings)

        class Counted:
            def get_object(self, **request: Any) -> Any:
                store.requests.append(request)
                answer = client.get_object(**request)
                store.has_read()
                return answer

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


async def test_nobody_joins_a_download_across_a_change(s3: Any) -> None:
    store = Store(s3)
    store.put(b"first")
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
    assert (await early, await late) == (b"first", b"second")


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
    store = Store(s3, max_bytes=10)
    store.put(b"small", "small")
    store.put(b"larger than ten", "large")
    await store.read(store.ref("small"))
    assert await store.read(store.ref("large")) == b"larger than ten"
    await store.read(store.ref("large"))
    await store.read(store.ref("small"))
    assert (store.downloads, store.reused("hit")) == (3, 1)


async def test_equal_bytes_are_decoded_once(s3: Any) -> None:
    store, data = Store(s3), png()
    async with asyncio.timeout(60):
        decoders = DecoderPool(ImageTransform(size=(8, 8)), workers=1)
        await decoders.start()
        try:
            images = ImageReuse(store.fetcher, decoders, store.metrics, max_bytes=1_000_000)
            fetched = [await images.fetch(ImageRef(data=data), b"") for _ in range(2)]
            first, second = [await images.prepare(image, b"") for image in fetched]
            assert first is second
            assert await images.prepare(fetched[0], b"other tenant") is not first
            assert await images.prepare(fetched[0], b"", may_reuse=False) is not first
        finally:
            await decoders.close()
    assert store.metrics.image_reuse.labels("prepare", "hit")._value.get() == 1


@pytest.mark.s3
async def test_a_real_store_says_that_nothing_has_changed(versity_s3: Any) -> None:
    store = Store(versity_s3)
    store.put(b"bytes", "a b/50+ü &%日本.png")
    ref = store.ref("a b/50+ü &%日本.png")
    assert [await store.read(ref) for _ in range(3)] == [b"bytes"] * 3
    assert (store.downloads, store.reused("hit")) == (1, 2)
    store.put(b"other", "a b/50+ü &%日本.png")
    assert await store.read(ref) == b"other"
