"""Batch send: many records of one topic in whole batches, without a task and a future for each record."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.producer.message_accumulator import BatchBuilder

if TYPE_CHECKING:
    from nanovllm.kafka.records import OutgoingRecord

YIELD_EVERY_RECORDS = 16
"""Records that are appended before the event loop is yielded to."""


async def send_batches(
    producer: AIOKafkaProducer, topic: str, records: Sequence[OutgoingRecord], max_bytes: int
) -> list[KafkaError | None]:
    """Send ``records`` of ``topic``, each to the partition that ``send`` would choose.

    Returns the error of each record, None where all replicas have it.

    Those of a partition keep their order. Those without a key share one partition, which differs from call to call: the
    more records a batch holds, the less each one costs. No batch exceeds ``max_bytes``, for a topic's limit is meant
    for whole batches.

    Raises:
        KafkaError: the topic's partitions cannot be asked for; none was sent.
    """
    await producer.partitions_for(topic)
    partitions: dict[bytes | None, int] = {}
    batches: dict[int, BatchBuilder] = {}
    batch_of: list[BatchBuilder] = []
    sent: dict[BatchBuilder, asyncio.Future[object]] = {}
    errors: dict[BatchBuilder, KafkaError] = {}

    async def send(partition: int) -> None:
        batch = batches.pop(partition)
        batch.close()
        try:
            sent[batch] = await producer.send_batch(batch, topic, partition=partition)
        except KafkaError as error:
            errors[batch] = error

    try:
        for number, record in enumerate(records, 1):
            key, value = record.key, record.value
            if key not in partitions:
                partitions[key] = producer._partition(topic, None, key, value, key, value)
            partition = partitions[key]
            if partition not in batches:
                batches[partition] = producer.create_batch()
            if not _append(batches[partition], record, max_bytes):
                await send(partition)
                batches[partition] = producer.create_batch()
                _append(batches[partition], record, max_bytes)
            batch_of.append(batches[partition])
            if number % YIELD_EVERY_RECORDS == 0:
                await asyncio.sleep(0)
        for partition in list(batches):
            await send(partition)
    finally:
        outcomes = await asyncio.gather(*sent.values(), return_exceptions=True)
    for batch, outcome in zip(sent, outcomes, strict=True):
        if isinstance(outcome, KafkaError):
            errors[batch] = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
    return [errors.get(batch) for batch in batch_of]


def _append(batch: BatchBuilder, record: OutgoingRecord, max_bytes: int) -> bool:
    if batch.record_count() > 0 and batch.size() + record.size_bytes > max_bytes:
        return False
    headers = list(record.headers)
    return batch.append(timestamp=None, key=record.key, value=record.value, headers=headers) is not None
