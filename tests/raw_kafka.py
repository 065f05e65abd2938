"""Record batches written by hand: what no client library would send, and a broker takes all the same."""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence

from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import _DefaultRecordBatchBuilderPy
from aiokafka.record.util import calc_crc32c

CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
BATCH_HEADER_BYTES = 61

Record = tuple[bytes | None, bytes | None, Sequence[tuple[bytes, bytes | None]]]
"""Key, value and headers."""


class RawName(str):
    """The name of a header that is these bytes, whatever they are in UTF-8."""

    raw: bytes

    def encode(self, *_: object) -> bytes:
        return self.raw


def raw_name(raw: bytes) -> RawName:
    name = RawName(raw.decode("latin-1"))
    name.raw = raw
    return name


def raw_batch(*records: Record, codec: int = 0, timestamp_ms: int | None = None) -> bytearray:
    """A record batch of magic 2; ``timestamp_ms`` None: now."""
    builder = _DefaultRecordBatchBuilderPy(2, codec, 0, -1, -1, 0, 16 << 20)
    for number, (key, value, headers) in enumerate(records):
        named = [(raw_name(name), header) for name, header in headers]
        at = int(time.time() * 1000) if timestamp_ms is None else timestamp_ms
        builder.append(number, at, key=key, value=value, headers=named)
    return bytearray(builder.build())


def with_attributes(batch: bytearray, attributes: int) -> bytearray:
    """``batch`` with other attributes: codec, kind of timestamp, transactional, control."""
    struct.pack_into(">h", batch, 21, attributes)
    return signed(batch)


def signed(batch: bytearray) -> bytearray:
    """``batch`` with the checksum of what it holds now."""
    struct.pack_into(">I", batch, 17, calc_crc32c(bytes(batch[21:])))
    return batch


async def produce(client: AIOKafkaClient, topic: str, partition: int, batch: bytes | bytearray) -> int:
    """Send a batch as it is to the partition's leader; the broker's error code, 0 when it took the batch."""
    await client.force_metadata_update()
    leader = client.cluster.leader_for_partition(TopicPartition(topic, partition))
    request = ProduceRequest(None, -1, 30_000, [(topic, [(partition, bytes(batch))])])
    response = await client.send(leader, request)
    ((_, ((_, code, *_),)),) = response.topics
    return int(code)
