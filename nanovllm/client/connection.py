"""Connections of the clients to the brokers, as context managers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from nanovllm.kafka.client import client_kwargs, producer_kwargs
from nanovllm.kafka.errors import refusals_of
from nanovllm.kafka.recovering_producer import RecoveringProducer
from nanovllm.kafka.topic_presence import require_topics
from nanovllm.settings.kafka import KafkaSettings


@asynccontextmanager
async def connected_consumer(kafka: KafkaSettings, *topics: str) -> AsyncIterator[AIOKafkaConsumer]:
    """A started consumer of ``topics`` without a group: committed records, each partition from its beginning.

    Raises:
        BrokersUnavailable: a KafkaError at its start, or inside the context.
        MissingTopic: one of ``topics`` is missing, which aiokafka would wait for until its request timed out.
    """
    if topics:
        await require_topics(kafka, topics)
    options = {"enable_auto_commit": False, "isolation_level": "read_committed", "auto_offset_reset": "earliest"}
    async with _connected(AIOKafkaConsumer(*topics, **client_kwargs(kafka), **options), kafka) as consumer:
        yield consumer


@asynccontextmanager
async def connected_producer(kafka: KafkaSettings) -> AsyncIterator[AIOKafkaProducer]:
    """A started producer. Raises as ``connected_consumer`` does."""
    async with _connected(AIOKafkaProducer(**producer_kwargs(kafka)), kafka) as producer:
        yield producer


@asynccontextmanager
async def recovering_producer(kafka: KafkaSettings) -> AsyncIterator[RecoveringProducer]:
    """As ``connected_producer``; one that breaks down is replaced."""
    async with _connected(RecoveringProducer(lambda: AIOKafkaProducer(**producer_kwargs(kafka))), kafka) as producer:
        yield producer


@asynccontextmanager
async def _connected(client: Any, kafka: KafkaSettings) -> AsyncIterator[Any]:
    try:
        with refusals_of(kafka.bootstrap_servers):
            await client.start()
            yield client
    finally:
        await client.stop()
