from __future__ import annotations

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from botocore.exceptions import ClientError
from parts import S3Part, create_topic

from nanovllm.demo.object_store import EmbeddedObjectStore


async def carries_a_record(bootstrap_servers: str, topic: str) -> None:
    await create_topic(bootstrap_servers, topic, partitions=1)
    async with AIOKafkaProducer(bootstrap_servers=bootstrap_servers) as producer:
        await producer.send_and_wait(topic, b"value", key=b"key")
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=bootstrap_servers, auto_offset_reset="earliest")
    async with consumer:
        record = await consumer.getone()
    assert (record.key, record.value) == (b"key", b"value")


async def test_the_embedded_broker_carries_a_record(embedded_broker, unique):
    await carries_a_record(embedded_broker, unique("topic"))


@pytest.mark.kafka
async def test_apache_kafka_carries_a_record(kafka_broker, unique):
    await carries_a_record(kafka_broker, unique("topic"))


def keeps_objects(part) -> None:
    bucket = part.make_bucket()
    assert part.put(bucket, "a b/50+ü.png", b"bytes") == f"s3://{bucket}/a b/50+ü.png"
    assert part.client.get_object(Bucket=bucket, Key="a b/50+ü.png")["Body"].read() == b"bytes"
    with pytest.raises(ClientError, match="NoSuchKey"):
        part.client.get_object(Bucket=bucket, Key="missing")


def test_moto_keeps_objects(s3):
    keeps_objects(s3)


@pytest.mark.s3
def test_the_real_s3_server_keeps_objects(versity_s3):
    keeps_objects(versity_s3)


@pytest.mark.minio
def test_minio_keeps_objects(minio_s3):
    keeps_objects(minio_s3)


async def test_the_embedded_object_store_answers_once_started():
    store = EmbeddedObjectStore()
    await store.start()
    try:
        part = S3Part(store.endpoint_url, "any", "any")
        keeps_objects(part)
        store.create_bucket("plain")
        store.put("plain", "a b/50+ü.png", b"bytes")
        assert part.client.get_object(Bucket="plain", Key="a b/50+ü.png")["Body"].read() == b"bytes"
    finally:
        store.stop()
