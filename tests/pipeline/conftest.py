"""A worker bench for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from aiokafka import AIOKafkaProducer
from bench import PARTITIONS, Bench
from parts import S3Part, create_topic

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.kafka.client import producer_kwargs
from nanovllm.settings.worker import Settings
from nanovllm.vision.images.decode import ImageLimits
from nanovllm.vision.images.pool import DecoderPool


@asynccontextmanager
async def bench_on(broker: str, unique: Callable[[str], str], s3: S3Part) -> AsyncIterator[Bench]:
    topics = {name: unique(name) for name in ("jobs", "results", "metrics", "dead_letters")}
    await create_topic(broker, *topics.values(), partitions=PARTITIONS)
    settings = Settings.model_validate(
        {
            "kafka": {"bootstrap_servers": broker, "group_id": unique("group")},
            "topics": topics | {"replayed": unique("replayed")},  # made by the first replay
            "s3": {"endpoint_url": s3.endpoint_url, "addressing_style": "path", "allow": ("s3://images",)},
            "images": {"max_bytes": 100_000},
            "admission": {"drain_timeout_s": 20, "idle_exit_s": 0.5, "max_jobs": 16},
        }
    )
    producer = AIOKafkaProducer(**producer_kwargs(settings.kafka))
    await producer.start()
    echo = EchoEngine()
    assert echo.image_transform is not None
    decoders = DecoderPool(echo.image_transform, ImageLimits(max_bytes=100_000), workers=1)
    await decoders.start()
    yield Bench(broker, settings, producer, decoders)
    await decoders.close()
    await producer.stop()


@pytest.fixture
async def bench(embedded_broker: str, unique: Callable[[str], str], s3: S3Part) -> AsyncIterator[Bench]:
    async with bench_on(embedded_broker, unique, s3) as bench:
        yield bench


@pytest.fixture
async def kafka_bench(kafka_broker: str, unique: Callable[[str], str], s3: S3Part) -> AsyncIterator[Bench]:
    """As ``bench``, on Apache Kafka. Tests that use it carry the marker ``kafka``."""
    async with bench_on(kafka_broker, unique, s3) as bench:
        yield bench


@pytest.fixture
def images(s3: S3Part) -> Callable[[str, bytes], str]:
    names = {bucket["Name"] for bucket in s3.client.list_buckets()["Buckets"]}
    if "images" not in names:
        s3.client.create_bucket(Bucket="images")
    return lambda key, body: s3.put("images", key, body)
