"""Raw records between good jobs: whatever bytes a broker takes from a producer, every good job is answered."""

from __future__ import annotations

import json
import struct
from collections import Counter
from random import Random

import pytest
from aiokafka.client import AIOKafkaClient
from bench import PARTITIONS, Bench, answered, eventually, reached
from raw_kafka import BATCH_HEADER_BYTES, CODECS, Record, produce, raw_batch, signed, with_attributes

from nanovllm.engine.backends.echo import EchoEngine

HEADER_NAMES = [
    b"", b"tr\xe4ce", b"\xff", b"traceparent", b"content-type", b"nanovllm_attempts", b"nanovllm_due_ms", b"ce_id",
    b"nanovllm_source_offset", b"nanovllm_code", b"x" * 3_000, "ü\u202e\x00".encode(), b"\xed\xa0\x80",
]  # fmt: skip
HEADER_VALUES = [None, b"", b"\x00" * 9, b"-1", b"1e309", b"99999999999999999999", b"\xff\xfe", b"v" * 5_000, b"[]"]
KEYS = [None, b"", b"\x00", b"k" * 4_000, b"\xff\xfe", b"nanovllm"]
TIMESTAMPS_MS = [None, None, None, -1, 0, 1, 4_102_444_800_000, 2**62]


def job(number: int) -> bytes:
    return json.dumps({"job_id": f"good-{number}", "prompt": "p"}).encode()


class RawFuzz:
    """Draws record batches: most are well formed with hostile records, some are damaged or wrongly described."""

    def __init__(self, seed: str) -> None:
        self._random = Random(seed)

    def batch(self) -> tuple[str, bytearray]:
        """What was done to a batch, and the batch."""
        random = self._random
        records = [self._record() for _ in range(random.choice((1, 1, 1, 2, 7)))]
        codec = random.choice((0, 0, *CODECS.values()))
        batch = raw_batch(*records, codec=codec, timestamp_ms=random.choice(TIMESTAMPS_MS))
        match random.randrange(12):
            case 0:
                return "attributes", with_attributes(batch, random.randrange(1 << 16) & 0x7F)
            case 1:
                at = random.randrange(BATCH_HEADER_BYTES, len(batch))
                batch[at] ^= 1 << random.randrange(8)
                return "damaged", signed(batch)
            case 2:
                return "cut", signed(batch[: random.randrange(BATCH_HEADER_BYTES, len(batch))])
            case 3:
                struct.pack_into(">i", batch, random.choice((23, 57)), random.choice((-1, 0, 3, 2**31 - 1)))
                return "counts", signed(batch)
            case 4:
                struct.pack_into(">qh", batch, 43, random.choice((-1, 2**30, 2**40)), random.choice((-1, 0, 3)))
                return "producer", signed(batch)
        return "records", batch

    def _record(self) -> Record:
        random = self._random
        names = [random.choice(HEADER_NAMES) for _ in range(random.choice((0, 0, 1, 3, 40)))]
        return random.choice(KEYS), self._value(), [(name, random.choice(HEADER_VALUES)) for name in names]

    def _value(self) -> bytes | None:
        random = self._random
        match random.randrange(9):
            case 0:
                return None
            case 1:
                return random.randbytes(random.choice((0, 1, 50, 3_000)))
            case 2:
                return job(0)[: random.randrange(30)]
            case 3:
                return b"[" * random.choice((50, 20_000))
            case 4:
                return b"\x81\xa6prompt" + random.randbytes(6)
            case 5:
                return json.dumps({"prompt": "p", "images": [0] * 9_000}).encode()
            case 6:
                return json.dumps({"prompt": "p", "deadline": random.choice((0, "9999999", -1e308))}).encode()
            case 7:
                return json.dumps({"messages": [{"role": "user", "content": ""}] * 2_000}).encode()
            case _:
                return json.dumps({"prompt": "p", "\ud800": "\udfff", "images": ["s3://nowhere/x"]}).encode()


async def answers_all(bench: Bench, *, raw_records: int, delivery: str) -> Counter[str]:
    """Work through ``raw_records`` raw batches with a good job behind every tenth; which kinds the broker took."""
    fuzz, taken, topic = RawFuzz(f"{raw_records}-{delivery}"), Counter[str](), bench.settings.topics.jobs
    good = {f"good-{number}" for number in range(0, raw_records, 10)}
    client = AIOKafkaClient(bootstrap_servers=bench.bootstrap_servers)
    await client.bootstrap()
    try:
        async with bench.working(EchoEngine(), delivery=delivery) as (_, running):
            for number in range(raw_records):
                kind, batch = fuzz.batch()
                partition = number % PARTITIONS
                if await produce(client, topic, partition, batch) == 0:
                    taken[kind] += 1
                if number % 10 == 0:
                    await bench.send(job(number), partition=partition)
                assert not running.done(), f"the worker ended over raw record {number} ({kind}): {running.exception()}"
            await answered(bench, good)
            for partition in range(PARTITIONS):
                end = await bench.ends(partition)
                await eventually(lambda end=end, partition=partition: reached(bench, end, partition), timeout_s=60)
            assert not running.done()
    finally:
        await client.close()
    return taken


@pytest.mark.kafka
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_every_good_job_among_200_raw_records_is_answered(kafka_bench: Bench, delivery: str) -> None:
    taken = await answers_all(kafka_bench, raw_records=200, delivery=delivery)
    assert taken["records"] > 80


@pytest.mark.kafka
@pytest.mark.proof
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_every_good_job_among_5000_raw_records_is_answered(kafka_bench: Bench, delivery: str) -> None:
    taken = await answers_all(kafka_bench, raw_records=5_000, delivery=delivery)
    assert taken["records"] > 2_000
