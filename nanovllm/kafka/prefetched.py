"""Prefetched records of a consumer, handed out one partition at a time.

``AIOKafkaConsumer.getmany`` of aiokafka 0.14 compares each partition that has records with each one that was asked for,
and hands out all that it has of the first before it looks at the next. That made a record cost milliseconds where a
member has a thousand partitions, and a partition full of small records kept the others waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.consumer.fetcher import FetchResult

# getmany() without partitions means all of them; asked for this one it returns nothing and still counts as a poll, so
# that a worker without work to take stays a member.
_NOWHERE = TopicPartition("", -1)


class Prefetched:
    """What a started ``consumer`` has fetched and not handed out yet."""

    def __init__(self, consumer: AIOKafkaConsumer) -> None:
        self._consumer: Any = consumer
        self._fetcher: Any = consumer._fetcher

    @property
    def partitions(self) -> Collection[TopicPartition]:
        """The partitions with records, or with an error, in the order of their turns."""
        return self._fetcher._records

    def is_error(self, tp: TopicPartition) -> bool:
        """Whether ``tp``, one of ``partitions``, has an error."""
        return type(self._fetcher._records[tp]) is not FetchResult

    async def raise_error(self, tp: TopicPartition) -> None:
        """Raise the error of ``tp``, a KafkaError, and have it fetched again."""
        await self._consumer.getmany(tp, timeout_ms=0)

    def take(self, tp: TopicPartition, max_records: int) -> list[ConsumerRecord]:
        """The next records of ``tp``, one of ``partitions``, whose turn is then the last; empty if its position moved.

        Raises:
            Exception: one of ``raw_records.PARSE_ERRORS``; the partition is fetched again from the same position.
        """
        results = self._fetcher._records
        result = results.pop(tp)
        try:
            records: list[ConsumerRecord] = result.getall(max_records)
            if result.has_more():
                results[tp] = result
        finally:
            if tp not in results:
                self._fetcher._notify(self._fetcher._wait_consume_future)
        return records

    async def look(self) -> None:
        """Count as a poll, and wait while a rebalance goes on.

        Raises:
            KafkaError: what befell the membership.
        """
        consumer = self._consumer
        consumer._coordinator.check_errors()
        with consumer._subscription.fetch_context():
            if consumer._subscription.reassignment_in_progress:
                await consumer._subscription.wait_for_assignment()

    async def wait(self, timeout_ms: int) -> None:
        """Return when something was fetched, at the latest after ``timeout_ms``.

        Raises:
            KafkaError: what befell the connection.
        """
        arrived = self._fetcher._create_fetch_waiter()
        try:
            with self._consumer._subscription.fetch_context():
                await asyncio.wait([arrived], timeout=timeout_ms / 1000)
            if arrived.done():
                arrived.result()
        finally:
            arrived.cancel()

    async def idle(self, timeout_ms: int) -> None:
        """Take nothing for ``timeout_ms``, and stay a member."""
        await self._consumer.getmany(_NOWHERE, timeout_ms=timeout_ms)
