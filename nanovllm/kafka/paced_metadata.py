"""Paced metadata requests: a pause after each one that did not bring what was asked for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from aiokafka import AIOKafkaClient
from aiokafka.cluster import ClusterMetadata

logger = logging.getLogger(__name__)

PAUSE_S = 0.5


def pace_metadata(client: AIOKafkaClient) -> None:
    """Pause after each metadata request of ``client`` that did not bring all its topics.

    aiokafka 0.14 asks again at once for as long as a record waits for a topic without a leader: some 700 requests a
    second, each with a line in the log.
    """
    update = client._metadata_update

    async def paced(cluster: ClusterMetadata, topics: Collection[str]) -> bool:
        is_updated = bool(await update(cluster, topics))
        if not is_updated:
            named = ", ".join(sorted(f"{broker.host}:{broker.port}" for broker in cluster.brokers()))
            logger.warning(
                "no broker answers at %s; brokers name these addresses themselves (advertised.listeners): "
                "each must resolve here and be open to this machine",
                named or "any address",
            )
        if not is_updated or any(cluster.partitions_for_topic(topic) is None for topic in topics or ()):
            await asyncio.sleep(PAUSE_S)
        return is_updated

    client._metadata_update = paced
