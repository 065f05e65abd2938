"""Where reading of a partition begins, and what retention took before that."""

from __future__ import annotations

import logging
from typing import Literal

from aiokafka import AIOKafkaConsumer, TopicPartition

from nanovllm.metrics import Metrics

logger = logging.getLogger(__name__)


class Places:
    """Finds where to read. The consumer's own reset would move on silently, whatever is lost.

    ``policy`` says where a partition begins of which nobody has read anything. Everything raises KafkaError when the
    brokers refuse.
    """

    def __init__(self, policy: Literal["earliest", "latest"], metrics: Metrics) -> None:
        self._policy = policy
        self._metrics = metrics

    async def near(self, consumer: AIOKafkaConsumer, tp: TopicPartition, wanted: int | None) -> int:
        """Where reading begins when it should begin at ``wanted`` (None: nobody has read here)."""
        if wanted is None:
            return await self.by_policy(consumer, tp)
        beginning: int = (await consumer.beginning_offsets([tp]))[tp]
        if wanted < beginning:
            logger.error(
                "%s-%d: retention removed the offsets %d to %d before they were read: jobs may be lost; "
                "raise the topic's retention, or add workers",
                *(tp.topic, tp.partition, wanted, beginning - 1),
            )
            self._metrics.overtaken.labels(tp.topic, tp.partition).inc(beginning - wanted)
        return max(wanted, beginning)

    async def by_policy(self, consumer: AIOKafkaConsumer, tp: TopicPartition) -> int:
        """The log's beginning or its end."""
        find = consumer.beginning_offsets if self._policy == "earliest" else consumer.end_offsets
        offset: int = (await find([tp]))[tp]
        return offset
