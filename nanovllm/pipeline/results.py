"""Reading what the worker published: results and dead letters, in the order in which they come."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError
from pydantic import ValidationError

from nanovllm.errors import BrokersUnavailable, InvalidJob
from nanovllm.pipeline.codec import decode_fields
from nanovllm.pipeline.settings import Settings
from nanovllm.sinks.kafka import read_dead_letter
from nanovllm.sinks.messages import DeadLetter, Result

Outcome = Result | DeadLetter


class ResultReader:
    """Follows the result topic, and the dead letters where asked, without a consumer group. An async context manager.

    From entry on nothing is missed: the place in each partition is fixed before ``__aenter__`` returns.
    """

    def __init__(self, settings: Settings, *, from_beginning: bool = False, dead_letters: bool = False) -> None:
        self._results = settings.topics.results
        self._topics = [self._results, *([settings.topics.dead_letters] if dead_letters else [])]
        self._from_beginning = from_beginning
        self._kafka = settings.kafka
        self.unreadable = 0

    async def __aenter__(self) -> Self:
        # Not in __init__: aiokafka takes the running event loop when it is constructed.
        self._consumer = AIOKafkaConsumer(
            **self._kafka.client_kwargs(),
            enable_auto_commit=False,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
        )
        try:
            await self._consumer.start()
            partitions = [TopicPartition(topic, n) for topic in self._topics for n in await self._partitions(topic)]
            self._consumer.assign(partitions)
            if self._from_beginning:
                await self._consumer.seek_to_beginning(*partitions)
            else:
                await self._consumer.seek_to_end(*partitions)
            for partition in partitions:
                await self._consumer.position(partition)
        except (KafkaError, BrokersUnavailable) as error:
            await self._consumer.stop()
            if isinstance(error, BrokersUnavailable):
                raise
            why = type(error).__name__
            raise BrokersUnavailable(
                f"the brokers at {self._kafka.bootstrap_servers} refuse or do not answer ({why})"
            ) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._consumer.stop()

    async def read(self, timeout_ms: int = 500) -> list[Outcome]:
        """What came within ``timeout_ms``; records that are not ours are counted in ``unreadable`` and skipped.

        Raises:
            BrokersUnavailable: the brokers refuse.
        """
        try:
            batches = await self._consumer.getmany(timeout_ms=timeout_ms)
        except KafkaError as error:
            raise BrokersUnavailable(f"the results cannot be read ({type(error).__name__})") from error
        records = sorted((record for batch in batches.values() for record in batch), key=lambda r: r.timestamp)
        return [outcome for record in records if (outcome := self._parse(record)) is not None]

    def _parse(self, record: ConsumerRecord) -> Outcome | None:
        try:
            if record.topic == self._results:
                return Result.model_validate(decode_fields(record.value or b""))
            return read_dead_letter(record.headers)
        except (InvalidJob, ValidationError):
            self.unreadable += 1
            return None

    async def _partitions(self, topic: str) -> Sequence[int]:
        # The first question may create the topic, or meet a broker that has not heard of it yet.
        for _ in range(20):
            await self._consumer._client.add_topic(topic)
            if found := self._consumer._client.cluster.partitions_for_topic(topic):
                return sorted(found)
            await asyncio.sleep(0.1)
        raise BrokersUnavailable(f"topic {topic} does not exist; create it with: nanovllm topics create")
