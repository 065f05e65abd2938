"""The page store on moto and on a real S3 server."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from parts import FaultProxy, S3Part

from nanovllm.errors import ConfigurationError, NanoVLLMError, StoreUnreachable
from nanovllm.objects.s3_client import S3Client
from nanovllm.pipeline.documents.page_store import FORMAT_VERSION, PageKey, PageStore, PageStoreCounts
from nanovllm.settings.s3 import S3Settings

KEY = PageKey(
    page_digest="d" * 64,
    model={"revision": "m@1", "dtype": "float32"},
    prompt="Read <|image|>",
    sampling={"temperature": 0.0, "max_tokens": 8},
    response_schema={"properties": {"a": {}, "b": {}}},
    text_policy="ignore",
    ladder_step={"dpi": 150, "rotation": 0},
    tenant="acme",
)
OTHERS: dict[str, Any] = {
    "page_digest": "e" * 64,
    "model": {"revision": "m@1", "dtype": "bfloat16"},
    "prompt": "Read <|image|> ",
    "sampling": {"temperature": 0.1, "max_tokens": 8},
    "response_schema": {"properties": {"b": {}, "a": {}}},
    "text_policy": "hint",
    "ladder_step": {"dpi": 150, "rotation": 90},
    "tenant": "other",
}


@pytest.fixture(
    params=[
        "s3",
        pytest.param("versity_s3", marks=pytest.mark.s3),
        pytest.param("minio_s3", marks=pytest.mark.minio),
    ]
)
def store(request: pytest.FixtureRequest) -> S3Part:
    part: S3Part = request.getfixturevalue(request.param)
    return part


def call_of(endpoint_url: str) -> Callable[[Callable[[Any], Any]], Any]:
    return S3Client(S3Settings(endpoint_url=endpoint_url, addressing_style="path")).call


def pages_in(store: S3Part, bucket: str, **options: int) -> PageStore:
    return PageStore(f"s3://{bucket}/pages", call_of(store.endpoint_url), **options)


def test_everything_that_decides_an_answer_is_in_the_key() -> None:
    assert set(OTHERS) == {field.name for field in fields(PageKey)}
    keys = [replace(KEY, **{name: value}) for name, value in OTHERS.items()]
    assert len({key.digest for key in [KEY, *keys]}) == 1 + len(OTHERS)
    same = replace(KEY, sampling={"max_tokens": 8, "temperature": 0.0})
    assert same.digest == KEY.digest
    assert {same: 1}[KEY] == 1
    assert replace(KEY, response_schema=None).digest != replace(KEY, response_schema="null").digest


async def test_a_page_is_found_by_its_whole_key_by_other_workers_too(store: S3Part) -> None:
    bucket = store.make_bucket()
    one, another = pages_in(store, bucket), pages_in(store, bucket)
    assert await one.get(KEY) is None
    assert await one.put(KEY, b"page") == b"page"
    assert await another.get(KEY) == b"page"
    others = [replace(KEY, **{name: value}) for name, value in OTHERS.items()]
    assert [await another.get(key) for key in others] == [None] * len(others)
    assert (one.counts, another.counts.hits, another.counts.misses) == (PageStoreCounts(misses=1, written=1), 1, 8)


async def test_of_many_writers_all_go_on_with_the_first_ones_page(store: S3Part) -> None:
    bucket = store.make_bucket()
    workers = [pages_in(store, bucket) for _ in range(4)]
    kept = await asyncio.gather(*(worker.put(KEY, b"%d" % n) for n, worker in enumerate(workers * 3)))
    assert len(set(kept)) == 1
    assert await workers[0].get(KEY) == kept[0]
    assert sum(worker.counts.written for worker in workers) == 1
    assert sum(worker.counts.existing for worker in workers) == 11


async def test_many_pages_are_kept_and_read_at_once_with_a_bound_on_requests(store: S3Part) -> None:
    bucket, running, most = store.make_bucket(), 0, 0
    call = call_of(store.endpoint_url)

    def counted(operation: Callable[[Any], Any]) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return call(operation)
        finally:
            running -= 1

    pages = PageStore(f"s3://{bucket}", counted, max_requests=3)
    keys = [replace(KEY, page_digest=str(n)) for n in range(24)]
    await asyncio.gather(*(pages.put(key, key.page_digest.encode()) for key in keys))
    assert await asyncio.gather(*map(pages.get, keys)) == [key.page_digest.encode() for key in keys]
    assert most <= 3


def part_of(key: PageKey, payload: bytes, *, version: int = FORMAT_VERSION, digest: str | None = None) -> bytes:
    digest = digest or hashlib.sha256(payload).hexdigest()
    return f"nanovllm-page {version} {key.digest} {digest}\n".encode() + payload


@pytest.mark.parametrize(
    ("body", "counted"),
    [
        (b"", "corrupt"),
        (b"nanovllm-page 1 ab", "corrupt"),
        (part_of(KEY, b"page")[:-1], "corrupt"),
        (part_of(KEY, b"page", digest="0" * 64), "corrupt"),
        (b'{"a": 1}', "foreign"),
        (part_of(replace(KEY, tenant="other"), b"page"), "foreign"),
        (part_of(KEY, b"page", version=FORMAT_VERSION - 1), "foreign"),
        (part_of(KEY, b"x" * 5_000), "oversized"),
    ],
)
async def test_a_part_that_cannot_be_used_is_counted_and_replaced(s3: S3Part, body: bytes, counted: str) -> None:
    bucket = s3.make_bucket()
    pages = pages_in(s3, bucket, max_part_bytes=1_000)
    s3.put(bucket, pages.object_key(KEY), body)
    assert await pages.get(KEY) is None
    assert pages.counts == replace(PageStoreCounts(), **{counted: 1})
    assert await pages.put(KEY, b"page") == b"page"
    assert await pages.get(KEY) == b"page"
    assert pages.counts.written == 1


async def test_a_page_beyond_the_limit_is_not_kept(s3: S3Part) -> None:
    pages = pages_in(s3, s3.make_bucket(), max_part_bytes=10)
    assert await pages.put(KEY, b"x" * 11) == b"x" * 11
    assert await pages.get(KEY) is None
    assert await pages.put(KEY, b"x" * 10) == b"x" * 10
    assert await pages.get(KEY) == b"x" * 10
    assert pages.counts == PageStoreCounts(hits=1, misses=1, written=1, oversized=1)


def test_tenants_have_folders_of_their_own_that_no_name_leaves(s3: S3Part) -> None:
    pages = PageStore("s3://bucket/pages", call_of(s3.endpoint_url))
    tenants = ["acme", "Acme", "a/b", "..", "", "~", "ü", "-", "x" * 65, ".hidden"]
    folders = [pages.object_key(replace(KEY, tenant=tenant)).split("/") for tenant in tenants]
    assert all(len(parts) == 4 and parts[0] == "pages" for parts in folders)
    assert len({parts[1] for parts in folders}) == len(tenants)
    assert folders[0][1] == "acme"


async def test_a_store_that_fails_is_an_error_and_no_miss(s3: S3Part) -> None:
    bucket = s3.make_bucket()
    with pytest.raises(ConfigurationError, match="s3://"):
        PageStore("bucket", call_of(s3.endpoint_url))
    with pytest.raises(StoreUnreachable, match="NoSuchBucket"):
        await PageStore("s3://no-such-bucket-here", call_of(s3.endpoint_url)).get(KEY)
    async with FaultProxy(s3.endpoint_url, ["unavailable"]) as proxy:
        pages = PageStore(f"s3://{bucket}", call_of(proxy.url))
        with pytest.raises(NanoVLLMError):
            await pages.get(KEY)
        assert await pages.get(KEY) is None
        assert pages.counts == PageStoreCounts(misses=1)
