"""Batch send: many records of one topic in whole batches, without a task and a future for each record."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aiokafka import AIOKafkaProducer
from aiokafka.producer.message_accumulator import BatchBuilder

if TYPE_CHECKING:
    from nanovllm.kafka.records import OutgoingRecord

YIELD_EVERY_RECORDS = 16
"""Records that are appended before the event loop is yielded to."""


async def send_batches(
    producer: AIOKafkaProducer, topic: str, records: Sequence[OutgoingRecord], max_bytes: int
) -> None:
    """Return when all replicas have ``records`` of ``topic``, each in the partition that ``send`` would choose.

    Those of a partition keep their order. Those without a key share one partition, which differs from call to call: the
    more records a batch holds, the less each one costs. No batch exceeds ``max_bytes``, for a topic's limit is meant
    for whole batches.

    Raises:
        KafkaError: some of them are not there.
    """
    await producer.partitions_for(topic)
    partitions: dict[bytes | None, int] = {}
    by_partition: defaultdict[int, list[OutgoingRecord]] = defaultdict(list)
    for record in records:
        if record.key not in partitions:
            partitions[record.key] = producer._partition(
                topic, None, record.key, record.value, record.key, record.value
            )
        by_partition[partitions[record.key]].append(record)
    sent: list[asyncio.Future[object]] = []
    try:
        for partition, members in by_partition.items():
            await _send_to(partition, producer, topic, members, max_bytes, sent.append)
    finally:
        outcomes = await asyncio.gather(*sent, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


async def _send_to(
    partition: int,
    producer: AIOKafkaProducer,
    topic: str,
    records: Sequence[OutgoingRecord],
    max_bytes: int,
    on_sent: Callable[[asyncio.Future[object]], None],
) -> None:
    batch = producer.create_batch()
    for number, record in enumerate(records):
        is_full = batch.record_count() > 0 and batch.size() + record.size_bytes > max_bytes
        if is_full or not _append(batch, record):
            batch.close()
            on_sent(await producer.send_batch(batch, topic, partition=partition))
            batch = producer.create_batch()
            _append(batch, record)
        if number % YIELD_EVERY_RECORDS == YIELD_EVERY_RECORDS - 1:
            await asyncio.sleep(0)
    batch.close()
    on_sent(await producer.send_batch(batch, topic, partition=partition))


def _append(batch: BatchBuilder, record: OutgoingRecord) -> bool:
    headers = list(record.headers)
    return batch.append(timestamp=None, key=record.key, value=record.value, headers=headers) is not None
