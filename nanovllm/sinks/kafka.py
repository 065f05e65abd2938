"""The Kafka sink: publishes records and returns when the brokers have acknowledged them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from functools import partial

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.structs import RecordMetadata

from nanovllm.errors import ErrorClass, MessageTooLarge, NanoVLLMError, TransientError
from nanovllm.kafka.batch_send import send_batches
from nanovllm.kafka.errors import publish_error
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.kafka.recovering_producer import RecoveringProducer
from nanovllm.kafka.topic_limits import TopicLimits
from nanovllm.sinks.base import Sink

IN_ONE_TASK = 2  # records, as of a result and its metrics
BATCHED_FROM = 8  # records of one topic; below, a batch of their own costs more than it saves


class KafkaSink:
    """Publishes records and returns when all of them are acknowledged.

    ``limits`` holds each topic's own limit. A record above it is refused here, before anything is sent: aiokafka's
    idempotent producer has counted a record that the broker then refuses, and could not send to that partition again.
    A limit that is lowered later refuses whole batches: they become smaller, and what fits is sent again.
    """

    part = "kafka producer"

    def __init__(
        self,
        producer: AIOKafkaProducer | RecoveringProducer,
        limits: TopicLimits | Mapping[str, int] | None = None,
    ) -> None:
        self._producer = producer
        self._limits = self.limits = limits if isinstance(limits, TopicLimits) else TopicLimits(limits)
        self.max_record_bytes = self._limits.room_for

    async def check(self, records: Sequence[OutgoingRecord]) -> None:
        """Refuse what a topic would refuse.

        Raises:
            MessageTooLarge: a record exceeds its topic's limit.
        """
        for record in records:
            if record.size_bytes <= self._limits.record_bytes(record.topic):
                continue
            limit = await self.max_record_bytes(record.topic, record.size_bytes)
            if record.size_bytes > limit:
                raise MessageTooLarge(
                    f"a record of {record.size_bytes} bytes is above the limit of {limit} bytes of topic {record.topic}"
                )

    async def publish(self, records: Sequence[OutgoingRecord]) -> None:
        """Send ``records`` and wait until all replicas have them.

        When it raises, some of them may have been published; they are the same when published again.

        Raises:
            MessageTooLarge: a record exceeds its topic's limit; none was sent.
            TransientError: the brokers did not answer in time.
            BrokersUnavailable: the brokers refuse, whatever is sent.
        """
        await self.check(records)
        raise_worst(await self.publish_each(records))

    async def publish_each(self, records: Sequence[OutgoingRecord]) -> list[NanoVLLMError | None]:
        """As ``publish`` without its check; returns the error of each record, None where it is acknowledged."""
        if len(records) >= BATCHED_FROM and len({record.topic for record in records}) == 1:
            return await self._send_batches(records)
        if len(records) <= IN_ONE_TASK:
            return await self._send(records)
        # Each in a task of its own: one that its topic does not take yet must not hold the others up.
        outcomes = await asyncio.gather(*(self._send([record]) for record in records))
        return [error for (error,) in outcomes]

    async def _send(self, records: Sequence[OutgoingRecord]) -> list[NanoVLLMError | None]:
        """Put all into their batches, then wait for all."""
        batch_bytes = self._limits.in_use_bytes
        sent: list[Awaitable[object] | KafkaError] = []
        for record in records:
            try:
                headers = list(record.headers)
                sent.append(await self._producer.send(record.topic, record.value, key=record.key, headers=headers))
            except KafkaError as error:
                sent.append(error)
        errors: list[NanoVLLMError | None] = []
        for record, acknowledged in zip(records, sent, strict=True):
            failure = acknowledged if isinstance(acknowledged, KafkaError) else None
            if not isinstance(acknowledged, KafkaError):
                try:
                    await acknowledged
                except KafkaError as error:
                    failure = error
            errors.append(None if failure is None else await self._meaning(record, failure, batch_bytes))
        return errors

    async def _meaning(self, record: OutgoingRecord, failure: KafkaError, batch_bytes: int) -> NanoVLLMError:
        meaning = publish_error(failure, record.topic)
        if isinstance(meaning, MessageTooLarge):
            meaning = await self._refused(record.topic, record.size_bytes, batch_bytes, meaning)
        meaning.__cause__ = failure
        return meaning

    async def _send_batches(self, records: Sequence[OutgoingRecord]) -> list[NanoVLLMError | None]:
        producer, topic, batch_bytes = self._producer, records[0].topic, self._limits.batch_bytes
        send = producer.send_batches if isinstance(producer, RecoveringProducer) else partial(send_batches, producer)
        errors: list[KafkaError | None]
        try:
            errors = await send(topic, records, min(batch_bytes, self._limits.record_bytes(topic)))
        except KafkaError as error:
            errors = [error] * len(records)
        # One batch has one error, which all its records share.
        meanings: dict[KafkaError, NanoVLLMError] = {}
        for failure in dict.fromkeys(one for one in errors if one is not None):
            meaning = publish_error(failure, topic)
            if isinstance(meaning, MessageTooLarge):
                largest = max(record.size_bytes for record in records)
                meaning = await self._refused(topic, largest, batch_bytes, meaning)
            meaning.__cause__ = failure
            meanings[failure] = meaning
        return [None if one is None else meanings[one] for one in errors]

    async def _refused(
        self, topic: str, record_bytes: int, batch_bytes: int, error: MessageTooLarge
    ) -> MessageTooLarge | TransientError:
        """What a broker's refusal of a size means for a record, which was alone in its batch or one of several.

        The idempotent producer breaks down at the next record of the partition, and the one that replaces it makes
        smaller batches.
        """
        is_replaced = isinstance(self._producer, RecoveringProducer)
        are_smaller = await self._limits.lower(batch_bytes)
        was_alone = record_bytes >= batch_bytes
        if record_bytes > self._limits.record_bytes(topic) or was_alone or not (is_replaced and are_smaller):
            return error
        return TransientError(f"topic {topic} takes smaller batches than it did: the record is sent again")


class Unsent:
    """Records to publish; each call sends those that no call before had acknowledged."""

    def __init__(self, sink: Sink, records: Sequence[OutgoingRecord]) -> None:
        self._sink = sink
        self.records = list(records)

    async def __call__(self) -> None:
        """Raises one of the errors, a systemic one before others."""
        errors = await self._sink.publish_each(self.records)
        self.records = [record for record, error in zip(self.records, errors, strict=True) if error is not None]
        raise_worst(errors)


def raise_worst(errors: Sequence[NanoVLLMError | None]) -> None:
    """Raise one of ``errors``, if there are any: a systemic one before others."""
    if found := [error for error in errors if error is not None]:
        raise max(found, key=lambda error: error.error_class is ErrorClass.SYSTEMIC)


async def send_record(producer: AIOKafkaProducer | RecoveringProducer, record: OutgoingRecord) -> RecordMetadata:
    """Send ``record`` and wait until all replicas have it.

    Raises:
        MessageTooLarge, TransientError, BrokersUnavailable: as ``publish_error`` says.
    """
    try:
        return await producer.send_and_wait(record.topic, record.value, key=record.key, headers=list(record.headers))
    except KafkaError as error:
        raise publish_error(error, record.topic) from error
