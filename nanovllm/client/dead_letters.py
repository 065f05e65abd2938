"""Dead letters: reading them back."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import datetime

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from nanovllm.client.connection import connected_consumer
from nanovllm.errors import BrokersUnavailable, MissingTopic
from nanovllm.kafka.raw_records import getmany
from nanovllm.kafka.records import Headers
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.input_names import input_names
from nanovllm.settings.kafka import KafkaSettings
from nanovllm.settings.worker import Settings
from nanovllm.sinks.dead_letter_record import SHA256_HEADER, TRUNCATED_HEADER, read_dead_letter
from nanovllm.sinks.kept_headers import OWN_PREFIX

POLL_MS = 300
# Behind the last readable record there may be offsets of markers and of open transactions.
IDLE_POLLS = 10


@dataclass(frozen=True)
class DeadLetterRecord:
    """A dead letter with what it holds: the original key, value and headers as far as they were kept."""

    partition: int
    offset: int
    letter: DeadLetter
    key: bytes | None
    value: bytes | None
    headers: Headers
    cut_sha256: str | None = None
    """Digest of the whole value where ``value`` is only its beginning."""

    @property
    def position(self) -> str:
        """Where it lies in the dead-letter topic: ``partition:offset``."""
        return f"{self.partition}:{self.offset}"

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the job's sender calls its images; decodes ``value``, which holds them."""
        return input_names(self.value)

    @classmethod
    def from_record(cls, record: ConsumerRecord) -> DeadLetterRecord:
        """Raises ValueError for a record that is no dead letter of ours."""
        own = dict(record.headers)
        return cls(
            record.partition,
            record.offset,
            read_dead_letter(record.headers),
            record.key,
            record.value,
            tuple((name, value) for name, value in record.headers if not name.startswith(OWN_PREFIX)),
            own[SHA256_HEADER].decode() if TRUNCATED_HEADER in own else None,
        )


@dataclass(frozen=True)
class LetterFilter:
    """A selection of dead letters; what is empty or None excludes nothing.

    ``since`` and ``until`` bound ``failed_at``; ``positions`` are those of ``DeadLetterRecord.position``.
    """

    codes: frozenset[str] = frozenset()
    classes: frozenset[str] = frozenset()
    stages: frozenset[str] = frozenset()
    job_ids: frozenset[str] = frozenset()
    positions: frozenset[str] = frozenset()
    since: datetime | None = None
    until: datetime | None = None
    only_retryable: bool = False

    def matches(self, entry: DeadLetterRecord) -> bool:
        """Whether ``entry`` is selected."""
        letter = entry.letter
        return (
            (not self.codes or letter.code in self.codes)
            and (not self.classes or letter.error_class in self.classes)
            and (not self.stages or letter.stage in self.stages)
            and (not self.job_ids or letter.job_id in self.job_ids)
            and (not self.positions or entry.position in self.positions)
            and (self.since is None or letter.failed_at >= self.since)
            and (self.until is None or letter.failed_at < self.until)
            and (letter.retryable or not self.only_retryable)
        )


async def read_dead_letters(settings: Settings, wanted: LetterFilter) -> AsyncGenerator[DeadLetterRecord, None]:
    """The dead letters that are there now and match, each partition in its order; records of others are skipped.

    Raises:
        BrokersUnavailable: the brokers do not answer or refuse.
        MissingTopic: there is no such topic.
    """
    async with aclosing(read_topic(settings.kafka, settings.topics.dead_letters)) as records:
        async for record in records:
            with suppress(ValueError):
                if wanted.matches(entry := DeadLetterRecord.from_record(record)):
                    yield entry


async def read_topic(
    kafka: KafkaSettings, topic: str, *, in_full: bool = False
) -> AsyncGenerator[ConsumerRecord, None]:
    """The committed records that are in ``topic`` now, each partition in its order.

    Raises:
        BrokersUnavailable: the brokers do not answer or refuse; with ``in_full`` also when the end of a partition was
            not reached.
        MissingTopic: there is no such topic.
    """
    async with connected_consumer(kafka, topic) as consumer:
        partitions = consumer.assignment()
        if not partitions:
            raise MissingTopic(f"there is no topic {topic}")
        ends = await consumer.end_offsets(partitions)
        idle = 0
        while not await _has_reached(consumer, ends):
            if idle == IDLE_POLLS:
                if in_full:
                    raise BrokersUnavailable(f"topic {topic} could not be read to its end")
                return
            batches = await getmany(consumer, timeout_ms=POLL_MS)
            idle = 0 if batches else idle + 1
            for tp, records in batches.items():
                for record in records:
                    if record.offset < ends[tp]:
                        yield record


async def _has_reached(consumer: AIOKafkaConsumer, ends: dict[TopicPartition, int]) -> bool:
    for tp, end in ends.items():
        if await consumer.position(tp) < end:
            return False
    return True
