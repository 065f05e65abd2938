"""Dead letters: reading them back, and sending what they hold once more."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from nanovllm.client.connection import connected_consumer, connected_producer
from nanovllm.errors import BrokersUnavailable
from nanovllm.kafka.raw_records import getmany
from nanovllm.kafka.records import Headers, OutgoingRecord
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.settings.kafka import KafkaSettings
from nanovllm.settings.worker import Settings
from nanovllm.sinks.dead_letter_record import SHA256_HEADER, TRUNCATED_HEADER, read_dead_letter
from nanovllm.sinks.kafka import send_record
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
    value: bytes
    headers: Headers
    cut_sha256: str | None = None
    """Digest of the whole value where ``value`` is only its beginning."""

    @property
    def position(self) -> str:
        """Where it lies in the dead-letter topic: ``partition:offset``."""
        return f"{self.partition}:{self.offset}"

    @classmethod
    def from_record(cls, record: ConsumerRecord) -> DeadLetterRecord:
        """Raises ValueError for a record that is no dead letter of ours."""
        own = dict(record.headers)
        return cls(
            record.partition,
            record.offset,
            read_dead_letter(record.headers),
            record.key,
            record.value or b"",
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


async def read_dead_letters(settings: Settings, wanted: LetterFilter) -> AsyncIterator[DeadLetterRecord]:
    """The dead letters that are there now and match, each partition in its order; records of others are skipped.

    Raises:
        BrokersUnavailable: the brokers do not answer or refuse, or there is no such topic.
    """
    topic = settings.topics.dead_letters
    async with connected_consumer(settings.kafka, topic) as consumer:
        partitions = consumer.assignment()
        if not partitions:
            raise BrokersUnavailable(f"there is no topic {topic}; create it with: nanovllm topics create")
        ends = await consumer.end_offsets(partitions)
        idle = 0
        while idle < IDLE_POLLS and not await _has_reached(consumer, ends):
            batches = await getmany(consumer, timeout_ms=POLL_MS)
            idle = 0 if batches else idle + 1
            for tp, records in batches.items():
                for record in records:
                    if record.offset < ends[tp]:
                        with suppress(ValueError):
                            if wanted.matches(entry := DeadLetterRecord.from_record(record)):
                                yield entry


@dataclass(frozen=True)
class Replay:
    """The outcome of one dead letter's replay."""

    entry: DeadLetterRecord
    state: Literal["replayed", "would be replayed", "skipped"]
    reason: str = ""


async def replay(
    kafka: KafkaSettings,
    topics: Iterable[str],
    letters: AsyncIterator[DeadLetterRecord],
    *,
    per_second: float,
    send: bool,
) -> AsyncIterator[Replay]:
    """Send what ``letters`` hold to the topics that they came from, one after the other: same bytes, key and headers.

    Of several dead letters of one record (it was delivered several times) the first is sent. A value that was cut
    is read again from where it came, and skipped when it no longer lies there as it was.

    Args:
        topics: where it may send; a dead letter from elsewhere is skipped, because its header is no authority.
        per_second: most records a second.
        send: False only says what would be sent.

    Raises:
        TransientError, BrokersUnavailable: the brokers did not take one; those before it are sent.
    """
    allowed = frozenset(topics)
    seen: set[tuple[str, int, int]] = set()
    async with connected_producer(kafka) as producer, connected_consumer(kafka) as consumer:
        async for entry in letters:
            source = entry.letter.source
            place = (source.topic, source.partition, source.offset)
            if source.topic not in allowed:
                yield Replay(entry, "skipped", f"it came from topic {source.topic}: allow it with --topic")
                continue
            if place in seen:
                yield Replay(entry, "skipped", "the same record as a dead letter before")
                continue
            seen.add(place)
            value = entry.value if entry.cut_sha256 is None else await _whole_value(consumer, entry)
            if value is None:
                yield Replay(entry, "skipped", "only its beginning is here, and its source holds it no longer")
            elif not send:
                yield Replay(entry, "would be replayed")
            else:
                await send_record(producer, OutgoingRecord(source.topic, entry.key, value, entry.headers))
                yield Replay(entry, "replayed")
                await asyncio.sleep(1.0 / per_second)


async def _whole_value(consumer: AIOKafkaConsumer, entry: DeadLetterRecord) -> bytes | None:
    source = entry.letter.source
    tp = TopicPartition(source.topic, source.partition)
    consumer.assign([tp])
    consumer.seek(tp, source.offset)
    for _ in range(IDLE_POLLS):
        for record in (await getmany(consumer, tp, timeout_ms=POLL_MS)).get(tp, ()):
            value: bytes = record.value or b""
            is_it = record.offset == source.offset and hashlib.sha256(value).hexdigest() == entry.cut_sha256
            return value if is_it else None
    return None


async def _has_reached(consumer: AIOKafkaConsumer, ends: dict[TopicPartition, int]) -> bool:
    for tp, end in ends.items():
        if await consumer.position(tp) < end:
            return False
    return True
