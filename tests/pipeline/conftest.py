"""A worker bench for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from bench import Bench, bench_on
from document_bench import Documents
from parts import S3Part, create_topic

from nanovllm.vision.images.pool import DecoderPool
from nanovllm.vision.images.preprocess import ImageTransform


@pytest.fixture
async def bench(embedded_broker: str, unique: Callable[[str], str], s3: S3Part) -> AsyncIterator[Bench]:
    async with bench_on(embedded_broker, unique, s3) as bench:
        yield bench


@pytest.fixture
async def kafka_bench(kafka_broker: str, unique: Callable[[str], str], s3: S3Part) -> AsyncIterator[Bench]:
    """As ``bench``, on Apache Kafka. Tests that use it carry the marker ``kafka``."""
    async with bench_on(kafka_broker, unique, s3) as bench:
        yield bench


@pytest.fixture(params=["boto3", "obstore"])
def object_client(request: pytest.FixtureRequest) -> str:
    """Each value of ``s3.client`` in turn."""
    client: str = request.param
    if client == "obstore":
        pytest.importorskip("obstore", reason="obstore: pip install 'nanovllm[obstore]'")
    return client


@pytest.fixture
def images(s3: S3Part) -> Callable[[str, bytes], str]:
    names = {bucket["Name"] for bucket in s3.client.list_buckets()["Buckets"]}
    if "images" not in names:
        s3.client.create_bucket(Bucket="images")
    return lambda key, body: s3.put("images", key, body)


@pytest.fixture
async def documents(bench: Bench, s3: S3Part, unique: Callable[[str], str], tmp_path: Path) -> Documents:
    events = unique("events")
    await create_topic(bench.bootstrap_servers, events, partitions=2)
    return Documents(bench, s3, s3.make_bucket(), events, tmp_path)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def decoders() -> AsyncIterator[DecoderPool]:
    """Decoder processes for the planted documents of a module."""
    pool = DecoderPool(ImageTransform.for_clip(32), workers=1, timeout_s=60.0)
    await pool.start()
    yield pool
    await pool.close()
