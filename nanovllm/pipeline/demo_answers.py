"""Reads what the worker publishes: results, and dead letters back from their headers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from aiokafka import AIOKafkaConsumer
from aiokafka.structs import ConsumerRecord

from nanovllm.pipeline.settings import KafkaSettings, TopicSettings
from nanovllm.sinks.messages import DeadLetter, Result

_HEADER_PREFIX = "nanovllm_"


class AnswerReader:
    """Everything in the result and dead-letter topics, from their beginning, without joining any group."""

    def __init__(self, consumer: AIOKafkaConsumer, topics: TopicSettings) -> None:
        self._consumer = consumer
        self._topics = topics

    async def read(self, timeout_ms: int = 200) -> list[Result | DeadLetter]:
        """What came since the last call, at the latest after ``timeout_ms``."""
        batches = await self._consumer.getmany(timeout_ms=timeout_ms)
        return [self._message(record) for records in batches.values() for record in records]

    def _message(self, record: ConsumerRecord) -> Result | DeadLetter:
        if record.topic == self._topics.results:
            return Result.model_validate_json(record.value)
        return dead_letter_from_headers(record.headers)


@asynccontextmanager
async def answer_reader(kafka: KafkaSettings, topics: TopicSettings) -> AsyncIterator[AnswerReader]:
    """A started reader; the topics must exist."""
    consumer = AIOKafkaConsumer(
        topics.results,
        topics.dead_letters,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        **kafka.client_kwargs(),
    )
    await consumer.start()
    try:
        yield AnswerReader(consumer, topics)
    finally:
        await consumer.stop()


def dead_letter_from_headers(headers: Sequence[tuple[str, bytes]]) -> DeadLetter:
    """The envelope of a dead letter, whose record's value is the original message.

    Raises:
        ValueError: the headers are no envelope.
    """
    fields: Mapping[str, str] = {
        name.removeprefix(_HEADER_PREFIX): value.decode(errors="replace")
        for name, value in headers
        if name.startswith(_HEADER_PREFIX)
    }
    source = {name.removeprefix("source_"): value for name, value in fields.items() if name.startswith("source_")}
    envelope: dict[str, object] = {name: fields[name] for name in DeadLetter.model_fields if name in fields}
    envelope |= {"version": int(fields.get("version", 1)), "error_class": fields.get("class"), "source": source}
    return DeadLetter.model_validate(envelope)
