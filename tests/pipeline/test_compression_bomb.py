"""Batches that unpack to far more than they are: the topic's settings bound them before a worker reads them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from aiokafka.client import AIOKafkaClient
from raw_kafka import CODECS, produce, raw_batch

from nanovllm.kafka.admin import create_topics, topic_states
from nanovllm.pipeline.topic_checks import findings, topic_needs
from nanovllm.settings.worker import Settings

MESSAGE_TOO_LARGE = 10
NOT_LEADER = 6


@pytest.mark.kafka
@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_a_topic_as_it_is_created_refuses_a_batch_that_unpacks_to_more_than_it_takes(
    kafka_broker: str, unique: Callable[[str], str], codec: str
) -> None:
    topics = {name: unique(name) for name in ("jobs", "results", "metrics", "dead_letters")}
    settings = Settings.model_validate(
        {"kafka": {"bootstrap_servers": kafka_broker, "max_request_bytes": 1_000_000}, "topics": topics}
    )
    needs = topic_needs(settings)
    await create_topics(settings.kafka, [need.name for need in needs], configs={n.name: n.configs for n in needs})
    small = raw_batch((b"k", json.dumps({"prompt": "p"}).encode(), []), codec=CODECS[codec])
    bomb = raw_batch((b"k", bytes(12 << 20), []), codec=CODECS[codec])
    assert len(bomb) < 1_000_000
    client = AIOKafkaClient(bootstrap_servers=kafka_broker)
    await client.bootstrap()
    try:
        for _ in range(100):
            code = await produce(client, topics["jobs"], 0, small)
            if code != NOT_LEADER:
                break
            await asyncio.sleep(0.1)  # the topic is new
        assert code == 0
        assert await produce(client, topics["jobs"], 0, bomb) == MESSAGE_TOO_LARGE
    finally:
        await client.close()
    states = await topic_states(settings.kafka, [need.name for need in needs])
    assert not any("compression.type" in found.what for found in findings(settings, states))


@pytest.mark.kafka
async def test_topics_check_tells_of_a_jobs_topic_that_keeps_what_producers_compress(
    kafka_broker: str, unique: Callable[[str], str]
) -> None:
    topics = {name: unique(name) for name in ("jobs", "results", "metrics", "dead_letters")}
    settings = Settings.model_validate({"kafka": {"bootstrap_servers": kafka_broker}, "topics": topics})
    await create_topics(settings.kafka, list(topics.values()))
    states = await topic_states(settings.kafka, list(topics.values()))
    found = [one for one in findings(settings, states) if "compression.type" in one.what]
    assert [(one.topic, one.level) for one in found] == [(topics["jobs"], "warning")]
