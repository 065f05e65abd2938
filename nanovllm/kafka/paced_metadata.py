"""Paced metadata requests: a pause after each one that did not bring what was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from aiokafka import AIOKafkaClient
from aiokafka.cluster import ClusterMetadata

PAUSE_S = 0.5


def pace_metadata(client: AIOKafkaClient) -> None:
    """Pause after each metadata request of ``client`` that did not bring all its topics.

    aiokafka 0.14 asks again at once for as long as a record waits for a topic without a leader: some 700 requests a
    second, each with a line in the log.
    """
    update = client._metadata_update

    async def paced(cluster: ClusterMetadata, topics: Collection[str]) -> bool:
        is_updated = bool(await update(cluster, topics))
        if not is_updated or any(cluster.partitions_for_topic(topic) is None for topic in topics or ()):
            await asyncio.sleep(PAUSE_S)
        return is_updated

    client._metadata_update = paced
