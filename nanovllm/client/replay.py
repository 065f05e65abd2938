"""Replay of dead letters: what they hold is sent once more, and a compacted topic records what was."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from aiokafka import AIOKafkaConsumer, TopicPartition

from nanovllm.client.connection import connected_consumer, recovering_producer
from nanovllm.client.dead_letters import IDLE_POLLS, POLL_MS, DeadLetterRecord, read_topic
from nanovllm.errors import MessageTooLarge
from nanovllm.kafka.admin import COMPACTED, create_topics, topic_states
from nanovllm.kafka.raw_records import getmany
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.kafka.recovering_producer import RecoveringProducer
from nanovllm.messages.base import Message, Source
from nanovllm.settings.worker import Settings
from nanovllm.sinks.kafka import send_record
from nanovllm.sinks.kept_headers import MAX_REPLAYS, REPLAYS_HEADER, rfc3339


@dataclass(frozen=True)
class Replay:
    """The outcome of one dead letter's replay."""

    entry: DeadLetterRecord
    state: Literal["replayed", "would be replayed", "skipped"]
    reason: str = ""


class ReplayMark(Message):
    """A value of the topic `topics.replayed`: when a record was replayed, and the place of its dead letter."""

    replayed_at: datetime
    dead_letter: str


async def replay(
    settings: Settings,
    topics: Iterable[str],
    letters: AsyncGenerator[DeadLetterRecord, None],
    *,
    per_second: float,
    send: bool,
    again: bool = False,
) -> AsyncIterator[Replay]:
    """Send what ``letters`` hold to the topics that they came from, one after the other: same bytes, key and headers.

    Of several dead letters of one record (it was delivered several times) the first is sent; what was sent by an
    earlier replay is skipped. A value that was cut is read again from where it came, and skipped when it no longer lies
    there as it was. A record counts as replayed once the brokers have both it and its mark: a crash between the two
    lets the next replay send it a second time, and so do two replays at once.

    Args:
        topics: where it may send; a dead letter from elsewhere is skipped, because its header is no authority.
        per_second: most records a second.
        send: False only says what would be sent.
        again: also send what was sent by an earlier replay.

    Raises:
        TransientError, BrokersUnavailable: the brokers did not take one; those before it are sent.
    """
    kafka, allowed = settings.kafka, frozenset(topics)
    has_marks = await _has_topic_of_marks(settings, create=send)
    reasons = await _replayed_before(settings) if has_marks and not again else {}
    async with recovering_producer(kafka) as producer, connected_consumer(kafka) as consumer, aclosing(letters):
        async for entry in letters:
            source = entry.letter.source
            key = _mark_key(source)
            if source.topic not in allowed:
                yield Replay(entry, "skipped", f"it came from topic {source.topic}: allow it with --topic")
            elif key in reasons:
                yield Replay(entry, "skipped", reasons[key])
            else:
                reasons[key] = "the same record as a dead letter before"
                record = await _record_of(entry, consumer)
                if record is None:
                    yield Replay(entry, "skipped", "only its beginning is here, and its source holds it no longer")
                elif not send:
                    yield Replay(entry, "would be replayed")
                else:
                    yield await _send(entry, record, producer, settings.topics.replayed)
                    await asyncio.sleep(1.0 / per_second)


async def _send(entry: DeadLetterRecord, record: OutgoingRecord, producer: RecoveringProducer, marks: str) -> Replay:
    """Send ``record``, and behind it its mark to the topic ``marks``."""
    try:
        await send_record(producer, record)
    except MessageTooLarge as error:
        await producer.replace()
        return Replay(entry, "skipped", str(error))
    mark = ReplayMark(replayed_at=datetime.now(UTC), dead_letter=entry.position)
    await send_record(producer, OutgoingRecord(marks, _mark_key(entry.letter.source), mark.model_dump_json().encode()))
    return Replay(entry, "replayed")


async def _has_topic_of_marks(settings: Settings, *, create: bool) -> bool:
    """Whether the topic of the marks is there; with ``create`` it is made where there are dead letters."""
    kafka, marks, letters = settings.kafka, settings.topics.replayed, settings.topics.dead_letters
    # Looked up before it is read: brokers that make topics by themselves would make one that is not compacted.
    states = await topic_states(kafka, (marks, letters))
    if create and marks not in states and letters in states:
        copies = states[letters].replication
        configs = COMPACTED | ({"min.insync.replicas": "2"} if copies > 2 else {})
        await create_topics(kafka, [marks], partitions=1, replication=copies, configs={marks: configs})
    return marks in states


async def _replayed_before(settings: Settings) -> dict[bytes, str]:
    """What earlier replays have sent, in words, by the keys of their marks; a mark without a value takes one back."""
    replayed: dict[bytes, str] = {}
    async for record in read_topic(settings.kafka, settings.topics.replayed, in_full=True):
        if record.value is None:
            replayed.pop(record.key, None)
            continue
        with suppress(ValueError):
            at = ReplayMark.model_validate_json(record.value).replayed_at
            replayed[record.key] = f"replayed at {rfc3339(at)}: send it with --again"
    return replayed


def _mark_key(source: Source) -> bytes:
    """The record that a dead letter came from; with its timestamp, since a topic made anew has the same offsets."""
    timestamp_ms = -1 if source.timestamp_ms is None else source.timestamp_ms
    return f"{source.topic}:{source.partition}:{source.offset}:{timestamp_ms}".encode()


async def _record_of(entry: DeadLetterRecord, consumer: AIOKafkaConsumer) -> OutgoingRecord | None:
    """What is sent for ``entry``; None where its value was cut and lies nowhere else."""
    value = entry.value if entry.cut_sha256 is None else await _whole_value(consumer, entry)
    if value is None and entry.cut_sha256 is not None:
        return None
    replays = min((entry.letter.replays or 0) + 1, MAX_REPLAYS)
    headers = (*entry.headers, (REPLAYS_HEADER, str(replays).encode()))
    return OutgoingRecord(entry.letter.source.topic, entry.key, value, headers)


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
