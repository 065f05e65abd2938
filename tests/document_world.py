"""Worker processes that make records of documents: Apache Kafka, and a real S3 server that notifies it by itself."""

from __future__ import annotations

import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from parts import S3Part, VersityNode, create_topic, unique_name
from prometheus_client.parser import text_string_to_metric_families
from world import PARTITIONS, World

from nanovllm.demo.child_process import LocalProcess, free_port
from nanovllm.messages.document_record import DocumentRecord

KEPT = "kept"
"""Prefix of the finished pages in the bucket."""


@dataclass
class DocumentWorld:
    """A world whose bucket notifies ``world.topics.events``, and a file of routes."""

    world: World
    port: int = field(default_factory=free_port)

    @property
    def routes(self) -> Path:
        return self.world.directory / "routes.yaml"

    @property
    def s3(self) -> S3Part:
        return self.world.s3

    @classmethod
    @asynccontextmanager
    async def on(cls, kafka_broker: str, directory: Path, settings: Mapping[str, str]) -> AsyncIterator[DocumentWorld]:
        """``settings``: environment variables of its workers."""
        events = unique_name("events")
        # The server's own record of a test comes when it starts: the topic is there before.
        await create_topic(kafka_broker, events, partitions=PARTITIONS)
        node = VersityNode(directory / "s3", notifies=(kafka_broker, events))
        try:
            world = World(kafka_broker, node.start(), directory, {}, events=events)
            await world.create_topics()
            own = cls(world)
            world.worker_settings = {"NANOVLLM_DOCUMENTS__ROUTES": str(own.routes), **settings}
            yield own
        finally:
            node.stop()

    def write_routes(self, *routes: Mapping[str, Any]) -> None:
        """Routes with a page store in the bucket."""
        file = {"version": 1, "page_store": f"s3://{self.world.bucket}/{KEPT}", "routes": [dict(one) for one in routes]}
        self.routes.write_text(yaml.safe_dump(file, sort_keys=False))

    def worker(self, name: str, **process: Any) -> LocalProcess:
        """A worker whose metrics ``metrics`` reads; one of this world at a time has that port."""
        self.world.worker_settings["NANOVLLM_HTTP__PORT"] = str(self.port)
        return self.world.worker(name, **process)

    def put(self, key: str, body: bytes) -> str:
        """Store an object; its entity tag."""
        answer = self.s3.client.put_object(Bucket=self.world.bucket, Key=key, Body=body)
        return str(answer["ETag"].strip('"'))

    def keys(self, prefix: str) -> list[str]:
        """Keys of the objects below ``prefix``."""
        pages = self.s3.client.get_paginator("list_objects_v2").paginate(Bucket=self.world.bucket, Prefix=prefix)
        return [one["Key"] for page in pages for one in page.get("Contents", ())]

    def sidecar(self, key: str) -> DocumentRecord:
        """The record beside the object ``key``."""
        answer = self.s3.client.get_object(Bucket=self.world.bucket, Key=f"{key}.json")
        return DocumentRecord.model_validate_json(answer["Body"].read())

    def metrics(self) -> Counter[str]:
        """The worker's counters and gauges: ``name`` and ``name{label,label}`` with the values of its labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = ",".join(sample.labels.values())
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = int(sample.value)
        return found

    async def records(self) -> list[DocumentRecord]:
        """The records that a read_committed reader sees now."""
        return await records_in(self.world.bootstrap_servers, self.world.topics.results)

    async def read(self, topic: str) -> list[ConsumerRecord]:
        """All that is committed in ``topic`` now."""
        return await committed_in(self.world.bootstrap_servers, topic)


async def records_in(bootstrap_servers: str, topic: str) -> list[DocumentRecord]:
    """The records of documents that a read_committed reader sees now."""
    return [DocumentRecord.model_validate_json(one.value) for one in await committed_in(bootstrap_servers, topic)]


async def committed_in(bootstrap_servers: str, topic: str) -> list[ConsumerRecord]:
    """All that is committed in a topic of a world now."""
    partitions = [TopicPartition(topic, number) for number in range(PARTITIONS)]
    # No seek: the consumer's own reset, if it were still under way, would win over it.
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap_servers,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        enable_auto_commit=False,
    )
    consumer.assign(partitions)
    found: list[ConsumerRecord] = []
    async with consumer:
        ends = await consumer.end_offsets(partitions)
        while any([await consumer.position(one) < ends[one] for one in partitions]):
            for batch in (await consumer.getmany(timeout_ms=200)).values():
                found += batch
    return found
