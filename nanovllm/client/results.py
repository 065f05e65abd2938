"""Reader of results and dead letters, in the order in which they come; without torch and numpy.

async with ResultReader(bootstrap_servers="localhost:9092", dead_letters=True) as reader:
    async for outcome in reader:
        print(outcome.job_id, outcome.text if isinstance(outcome, Result) else outcome.message)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Self

from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError
from pydantic import ValidationError

from nanovllm.client.connection import connected_consumer
from nanovllm.errors import BrokersUnavailable, InvalidJob, MissingTopic
from nanovllm.kafka.raw_records import getmany
from nanovllm.messages.codec import decode_fields
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.messages.result import Result
from nanovllm.settings.kafka import KafkaSettings
from nanovllm.settings.topics import TopicSettings
from nanovllm.settings.worker import Settings
from nanovllm.sinks.dead_letter_record import read_dead_letter

Outcome = Result | DeadLetter | DocumentRecord
_DOCUMENT_TYPE = ("ce_type", f"nanovllm.{DocumentRecord.schema_name}".encode())


class ResultReader:
    """Follows the result topic, and the dead letters where asked, without a consumer group. An async context manager.

    From entry on nothing is missed: the offset in each partition is fixed before ``__aenter__`` returns. Every reader
    reads the whole topics, and keeps no place in them: a service that must not miss a result across its restarts reads
    the topic of results as a consumer group of its own.

    Args:
        settings: brokers and topics; ``bootstrap_servers`` alone will do for the default topics.
        from_beginning: also what is there already.
        dead_letters: the dead letters too.
        documents: the records of documents that stand in the topic of results too.
        topics: more topics of results and records, such as those of routes.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        bootstrap_servers: str | None = None,
        from_beginning: bool = False,
        dead_letters: bool = False,
        documents: bool = False,
        topics: Sequence[str] = (),
    ) -> None:
        settings = settings or client_settings()
        kafka = settings.kafka
        if bootstrap_servers:
            kafka = kafka.model_copy(update={"bootstrap_servers": bootstrap_servers})
        self._results = frozenset([settings.topics.results, *topics])
        self._topics = [*self._results, *([settings.topics.dead_letters] if dead_letters else [])]
        self._from_beginning = from_beginning
        self._documents = documents
        self._kafka = kafka
        self.unreadable = 0

    async def __aenter__(self) -> Self:
        """Connect. Raises BrokersUnavailable, and MissingTopic where brokers do not create topics by themselves."""
        async with AsyncExitStack() as stack:
            # Not in __init__: aiokafka takes the running event loop when it is constructed. Partitions that are added
            # later are read from their beginning: nothing of theirs has been seen.
            self._consumer = await stack.enter_async_context(connected_consumer(self._kafka, *self._topics))
            partitions = await self._partitions()
            # Positions first: aiokafka's own reset to the beginning, if it were still under way, would win over a seek.
            for partition in partitions:
                await self._consumer.position(partition)
            if not self._from_beginning:
                for partition, end in (await self._consumer.end_offsets(partitions)).items():
                    self._consumer.seek(partition, end)
            self._connection = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.aclose()

    async def __aiter__(self) -> AsyncIterator[Outcome]:
        """Each outcome as it comes, without end. Raises as ``read`` does."""
        while True:
            for outcome in await self.read():
                yield outcome

    async def read(self, timeout_ms: int = 500) -> list[Outcome]:
        """What came within ``timeout_ms``; records that are not ours are counted in ``unreadable`` and skipped.

        Raises:
            BrokersUnavailable: the brokers refuse.
        """
        try:
            batches = await getmany(self._consumer, timeout_ms=timeout_ms)
        except KafkaError as error:
            raise BrokersUnavailable(f"the results cannot be read ({type(error).__name__})") from error
        records = sorted((record for batch in batches.values() for record in batch), key=lambda r: r.timestamp)
        return [outcome for record in records if (outcome := self._parse(record)) is not None]

    def _parse(self, record: ConsumerRecord) -> Outcome | None:
        try:
            if record.topic in self._results and _DOCUMENT_TYPE in record.headers:
                return DocumentRecord.model_validate(decode_fields(record.value or b"")) if self._documents else None
            if record.topic in self._results:
                return Result.model_validate(decode_fields(record.value or b""))
            return read_dead_letter(record.headers, record.value)
        except (InvalidJob, ValidationError):
            self.unreadable += 1
            return None

    async def _partitions(self) -> set[TopicPartition]:
        # The first question may create the topic, or meet a broker that has not heard of it yet.
        for _ in range(20):
            partitions: set[TopicPartition] = self._consumer.assignment()
            missing = set(self._topics) - {partition.topic for partition in partitions}
            if not missing:
                return partitions
            await asyncio.sleep(0.1)
        raise MissingTopic(f"there is no topic {min(missing)}")


def client_settings(kafka: KafkaSettings | None = None, topics: TopicSettings | None = None) -> Settings:
    """Settings of these two sections, without a look at the environment."""
    return Settings.model_construct(kafka=kafka or KafkaSettings(), topics=topics or TopicSettings())
