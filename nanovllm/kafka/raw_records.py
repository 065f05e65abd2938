"""Records read from raw batches, where the Kafka client cannot parse one of them.

aiokafka 0.14 decodes the names of headers strictly, as UTF-8, inside ``getmany``. One record with another name raises
``UnicodeDecodeError``, and so does every read of a record behind it in the same batch: no member of the group would get
past it. What ``getmany`` had taken from other partitions is lost with the exception, though their positions have moved.
So the partitions are put back to their ledgers' positions, and this poll reads them without the client's parser.
"""

from __future__ import annotations

import gzip
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import cramjam
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import CorruptRecordException, IllegalStateError
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import _DefaultRecordBatchPy as RecordBatch
from aiokafka.record.util import decode_varint

PARSE_ERRORS = (
    UnicodeError,
    CorruptRecordException,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    cramjam.DecompressionError,
)
"""What ``getmany`` raises over the bytes of a record; any other error is about brokers or the group."""

MAX_PARTITION_BYTES = 1 << 20
MAX_FETCH_BYTES = 16 << 20
MAX_RECORDS = 500

_READ_COMMITTED = 1

AbortedTransactions = Iterable[tuple[int, int]]
"""Producer id and first offset of each, as a broker's answer to a fetch lists them."""


@dataclass(frozen=True)
class RawRecord:
    """One record, with ``unreadable``, the reason why the client cannot parse it.

    ``headers`` are those whose names are UTF-8. Where a whole batch cannot be read it is one record: ``offset`` is the
    first one wanted of the batch, ``next_offset`` the one behind it, and there is neither key nor value.
    """

    offset: int
    next_offset: int
    timestamp: int = -1
    key: bytes | None = None
    value: bytes | None = None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    unreadable: str | None = None


async def read_raw(
    consumer: AIOKafkaConsumer, positions: Mapping[TopicPartition, int], max_records: int
) -> dict[TopicPartition, list[RawRecord]]:
    """At most ``max_records`` records from ``positions`` on, which ``consumer`` then goes on behind.

    Raises:
        KafkaError: the brokers refuse, or cannot be reached.
    """
    for tp, position in positions.items():
        _seek(consumer, tp, position)
    share = max(1, max_records // max(1, len(positions)))
    batches: dict[TopicPartition, list[RawRecord]] = {}
    for tp, (raw, aborted) in (await _fetch(consumer, positions)).items():
        records = list(islice(records_in(raw, positions[tp], aborted), min(share, max_records)))
        if records:
            _seek(consumer, tp, records[-1].next_offset)
            batches[tp] = records
        max_records -= len(records)
    return batches


async def getmany(
    consumer: AIOKafkaConsumer, *tps: TopicPartition, timeout_ms: int
) -> dict[TopicPartition, list[ConsumerRecord]]:
    """As ``consumer.getmany``, without the records that it cannot parse: for readers of what the worker has written.

    Raises:
        KafkaError: the brokers refuse, or cannot be reached.
    """
    positions = {tp: await consumer.position(tp) for tp in tps or consumer.assignment()}
    try:
        batches: dict[TopicPartition, list[ConsumerRecord]] = await consumer.getmany(*tps, timeout_ms=timeout_ms)
        return batches
    except PARSE_ERRORS:
        raw = await read_raw(consumer, positions, MAX_RECORDS)
    return {
        tp: [
            ConsumerRecord(*tp, one.offset, one.timestamp, 0, one.key, one.value, None, -1, -1, one.headers)
            for one in records
            if one.unreadable is None
        ]
        for tp, records in raw.items()
    }


def _seek(consumer: AIOKafkaConsumer, tp: TopicPartition, offset: int) -> None:
    with suppress(IllegalStateError):  # it left meanwhile: its next owner starts from the committed offset
        consumer.seek(tp, offset)


async def _fetch(
    consumer: AIOKafkaConsumer, positions: Mapping[TopicPartition, int]
) -> dict[TopicPartition, tuple[bytes, AbortedTransactions]]:
    """The batches of each partition as they lie in the log, the one with its position first."""
    client = consumer._client
    nodes: defaultdict[int, defaultdict[str, list[tuple[int, int, int]]]] = defaultdict(lambda: defaultdict(list))
    for tp, position in positions.items():
        leader = client.cluster.leader_for_partition(tp)
        if leader is not None and leader >= 0:
            nodes[leader][tp.topic].append((tp.partition, position, MAX_PARTITION_BYTES))
    raw: dict[TopicPartition, tuple[bytes, AbortedTransactions]] = {}
    for node, topics in nodes.items():
        request = FetchRequest(0, 1, MAX_FETCH_BYTES, _READ_COMMITTED, list(topics.items()))
        response = await client.send(node, request)
        for topic, partitions in response.topics:
            for number, _, _, *data in partitions:
                # Versions 4 to 10 end with the aborted transactions and the records; 11 has a replica between them.
                aborted = data[2] if response.API_VERSION >= 11 else data[-2]
                raw[TopicPartition(topic, number)] = bytes(data[-1] or b""), aborted or ()
    return raw


def records_in(raw: bytes, position: int, aborted: AbortedTransactions = ()) -> Iterator[RawRecord]:
    """The committed records of these batches from the offset ``position`` on.

    A batch that is cut at the end of ``raw`` belongs to the next fetch.
    """
    waiting = sorted(aborted, key=lambda transaction: transaction[1], reverse=True)
    aborting: set[int] = set()
    at = 0
    while len(raw) - at >= RecordBatch.HEADER_STRUCT.size:
        _, length, *_ = RecordBatch.HEADER_STRUCT.unpack_from(raw, at)
        end = at + RecordBatch.AFTER_LEN_OFFSET + length
        if end > len(raw) or end - at < RecordBatch.HEADER_STRUCT.size:
            return
        batch, at = RecordBatch(raw[at:end]), end
        while waiting and waiting[-1][1] <= batch.base_offset:
            aborting.add(waiting.pop()[0])
        if batch.is_control_batch:
            aborting.discard(batch.producer_id)
        elif batch.next_offset > position and not (batch.is_transactional and batch.producer_id in aborting):
            yield from (record for record in _readable(batch, position) if record.offset >= position)


def _readable(batch: RecordBatch, position: int) -> list[RawRecord]:
    try:
        if batch.magic != 2:
            raise ValueError(f"its format {batch.magic} is not known")
        if not batch.validate_crc():
            raise ValueError("its checksum is wrong")
        return list(_records_of(batch))
    except Exception as error:  # each library that decompresses has errors of its own
        why = str(error) if type(error) is ValueError else type(error).__name__
        first, behind = max(position, batch.base_offset), batch.next_offset
        return [RawRecord(first, behind, unreadable=f"the batch of the offsets {first} to {behind - 1}: {why}")]


def _records_of(batch: RecordBatch) -> Iterator[RawRecord]:
    batch._maybe_uncompress()
    buffer, at = batch._buffer, batch._pos
    for _ in range(batch._num_records):
        length, at = decode_varint(buffer, at)
        end = at + length
        timestamp_delta, at = decode_varint(buffer, at + 1)  # behind a byte of attributes, which has no meaning yet
        offset_delta, at = decode_varint(buffer, at)
        key, at = _nullable(buffer, at)
        value, at = _nullable(buffer, at)
        count, at = decode_varint(buffer, at)
        headers: list[tuple[str, bytes | None]] = []
        unreadable = None
        for _ in range(count):
            name, at = _nullable(buffer, at)
            header, at = _nullable(buffer, at)
            try:
                headers.append(((name or b"").decode(), header))
            except UnicodeDecodeError:
                unreadable = "the name of a header is not valid UTF-8"
        if at != end:
            raise ValueError("the lengths in it contradict one another")
        is_append_time = batch.timestamp_type == RecordBatch.LOG_APPEND_TIME
        timestamp = batch.max_timestamp if is_append_time else batch.first_timestamp + timestamp_delta
        offset = batch.base_offset + offset_delta
        yield RawRecord(offset, offset + 1, timestamp, key, value, tuple(headers), unreadable)


def _nullable(buffer: bytearray, at: int) -> tuple[bytes | None, int]:
    length, at = decode_varint(buffer, at)
    if length < 0:
        return None, at
    if at + length > len(buffer):
        raise ValueError("it ends in the middle of a record")
    return bytes(buffer[at : at + length]), at + length
