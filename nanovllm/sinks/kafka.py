"""The Kafka sink: publishes records and returns when the brokers have acknowledged them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.structs import RecordMetadata

from nanovllm.errors import ErrorClass, MessageTooLarge, NanoVLLMError
from nanovllm.kafka.batch_send import send_batches
from nanovllm.kafka.errors import publish_error
from nanovllm.kafka.records import DEFAULT_MAX_RECORD_BYTES, OutgoingRecord
from nanovllm.kafka.recovering_producer import RecoveringProducer

BATCHED_FROM = 8  # records of one topic; below, a batch of their own costs more than it saves


class KafkaSink:
    """Publishes records and returns when all of them are acknowledged.

    ``max_record_bytes`` holds each topic's own limit. A record above it is refused here, before anything is sent:
    aiokafka's idempotent producer has counted a record that the broker then refuses, and could not send to that
    partition again.
    """

    def __init__(
        self, producer: AIOKafkaProducer | RecoveringProducer, max_record_bytes: Mapping[str, int] | None = None
    ) -> None:
        self._producer = producer
        self._max_record_bytes = dict(max_record_bytes or {})

    def max_record_bytes(self, topic: str) -> int:
        """The largest record that ``topic`` takes."""
        return self._max_record_bytes.get(topic, DEFAULT_MAX_RECORD_BYTES)

    def check(self, records: Sequence[OutgoingRecord]) -> None:
        """Refuse what a topic would refuse.

        Raises:
            MessageTooLarge: a record exceeds its topic's limit.
        """
        for record in records:
            if record.size_bytes > self.max_record_bytes(record.topic):
                raise MessageTooLarge(
                    f"a record of {record.size_bytes} bytes is above the limit of {self.max_record_bytes(record.topic)}"
                    f" bytes of topic {record.topic}"
                )

    async def publish(self, records: Sequence[OutgoingRecord]) -> None:
        """Send ``records`` and wait until all replicas have them.

        When it raises, some of them may have been published; they are the same when published again.

        Raises:
            MessageTooLarge: a record exceeds its topic's limit; none was sent.
            TransientError: the brokers did not answer in time.
            BrokersUnavailable: the brokers refuse, whatever is sent.
        """
        self.check(records)
        if len(records) >= BATCHED_FROM and len({record.topic for record in records}) == 1:
            await self._send_batches(records)
            return
        sends = (send_record(self._producer, record) for record in records)
        outcomes = await asyncio.gather(*sends, return_exceptions=True)
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for error in errors:
            if not isinstance(error, NanoVLLMError):
                raise error
        if errors:
            raise max(errors, key=lambda error: getattr(error, "error_class", None) is ErrorClass.SYSTEMIC)

    async def _send_batches(self, records: Sequence[OutgoingRecord]) -> None:
        producer, topic = self._producer, records[0].topic
        send = producer.send_batches if isinstance(producer, RecoveringProducer) else partial(send_batches, producer)
        try:
            await send(topic, records, self.max_record_bytes(topic))
        except KafkaError as error:
            raise publish_error(error, topic) from error


async def send_record(producer: AIOKafkaProducer | RecoveringProducer, record: OutgoingRecord) -> RecordMetadata:
    """Send ``record`` and wait until all replicas have it.

    Raises:
        MessageTooLarge, TransientError, BrokersUnavailable: as ``publish_error`` says.
    """
    try:
        return await producer.send_and_wait(record.topic, record.value, key=record.key, headers=list(record.headers))
    except KafkaError as error:
        raise publish_error(error, record.topic) from error
