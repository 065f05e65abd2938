"""Records that the Kafka client cannot parse: each is a dead letter, and the partition goes on behind it."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from itertools import pairwise

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from bench import Bench, eventually, reached
from raw_kafka import BATCH_HEADER_BYTES, CODECS, Record, raw_batch, signed

from nanovllm.client.dead_letters import LetterFilter, read_dead_letters
from nanovllm.client.results import ResultReader
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.kafka.raw_records import records_in
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.result import Result

NAMES = [b"tr\xe4ce", b"\xff\xfe", b"\xc3", b"a\xed\xa0\x80"]

Unique = Callable[[str], str]


async def send_raw(
    bench: Bench, *records: Record, codec: int = 0, partition: int = 0, topic: str | None = None
) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=bench.bootstrap_servers)
    await producer.start()
    try:
        batch = producer.create_batch()
        batch._buffer = raw_batch(*records, codec=codec)
        batch._relative_offset = len(records)
        batch.close()
        await (await producer.send_batch(batch, topic or bench.settings.topics.jobs, partition=partition))
    finally:
        await producer.stop()


def job(job_id: str) -> bytes:
    return json.dumps({"job_id": job_id, "prompt": "p"}).encode()


@pytest.mark.kafka
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
@pytest.mark.parametrize("codec", CODECS)
async def test_a_header_whose_name_is_not_utf8_is_a_dead_letter_and_the_jobs_around_it_are_answered(
    kafka_bench: Bench, delivery: str, codec: str
) -> None:
    bench = kafka_bench
    await send_raw(
        bench,
        (b"k0", job("before"), []),
        (b"k1", job("strange"), [(NAMES[0], b"x"), (b"traceparent", b"00-1"), (b"none", None)]),
        (b"k2", job("between"), []),
        *((b"k3", b"other", [(name, b"x")]) for name in NAMES),
        (None, job("behind"), []),
        codec=CODECS[codec],
    )
    await bench.send({"job_id": "elsewhere", "prompt": "p"}, partition=1)
    async with bench.working(EchoEngine(), delivery=delivery):
        results = await bench.results(4)
        letters = await bench.dead_letters(1 + len(NAMES))
        await eventually(lambda: reached(bench, 8))
        # The worker goes on with what comes later.
        await bench.send({"job_id": "later", "prompt": "p"})
        results |= await bench.results(5)
    assert set(results) == {"before", "between", "behind", "elsewhere", "later"}
    (headers, value), *others = sorted(letters, key=lambda letter: letter[0]["nanovllm_source_offset"])
    assert value == job("strange")
    assert headers["nanovllm_code"] == "invalid_job"
    assert headers["nanovllm_source_offset"] == "1"
    assert headers["nanovllm_message"] == "the record cannot be read: the name of a header is not valid UTF-8"
    assert headers["traceparent"] == "00-1"
    assert [value for _, value in others] == [b"other"] * len(NAMES)


async def test_no_record_of_another_partition_is_lost_beside_one_that_cannot_be_parsed(bench: Bench) -> None:
    jobs = [{"job_id": f"j{i}", "prompt": "p"} for i in range(60)]
    for number, (one, other) in enumerate(pairwise(jobs)):
        if number % 2 == 0:
            await bench.send(one, partition=0)
            await bench.send(other, partition=1)
        if number % 6 == 0:
            await send_raw(bench, (None, b"v", [(NAMES[0], b"x")]), partition=number // 6 % 2)
    async with bench.working(EchoEngine()):
        results = await bench.results(60)
        letters = await bench.dead_letters(10)
    assert set(results) == {f"j{i}" for i in range(60)}
    assert len({(h["nanovllm_source_partition"], h["nanovllm_source_offset"]) for h, _ in letters}) == 10


@pytest.mark.parametrize("codec", CODECS.values())
def test_a_raw_batch_tells_all_of_its_records_and_which_the_client_cannot_parse(codec: int) -> None:
    wrong = [(b"ok", b"1"), (NAMES[1], b"2"), (b"nothing", None)]
    raw = raw_batch((b"k", b"v", []), (b"k1", b"v1", wrong), (None, None, [("ü".encode(), None)]), codec=codec)
    before, strange, behind = records_in(bytes(raw), 0)
    assert (before.offset, before.key, before.value, before.headers) == (0, b"k", b"v", ())
    assert (strange.offset, strange.key, strange.value) == (1, b"k1", b"v1")
    assert strange.headers == (("ok", b"1"), ("nothing", None))
    assert (behind.offset, behind.key, behind.value, behind.headers) == (2, None, None, (("ü", None),))
    assert [record.unreadable is None for record in (before, strange, behind)] == [True, False, True]
    assert strange.timestamp > 0
    assert [record.offset for record in records_in(bytes(raw), 2)] == [2]
    assert list(records_in(bytes(raw), 3)) == []
    assert list(records_in(bytes(raw[:-1]), 0)) == []


def test_a_batch_that_is_corrupt_is_one_record_and_the_next_batch_follows() -> None:
    corrupt = raw_batch((b"k", b"v", []), (b"k", b"v", []), (b"k", b"v", []))
    corrupt[-3] ^= 0xFF
    following = bytearray(raw_batch((None, b"v", [])))
    struct.pack_into(">q", following, 0, 3)
    broken, good = records_in(bytes(corrupt + following), 1)
    assert (broken.offset, broken.next_offset, broken.value) == (1, 3, None)
    assert broken.unreadable == "the batch of the offsets 1 to 2: its checksum is wrong"
    assert (good.offset, good.unreadable) == (3, None)


@pytest.mark.parametrize("codec", [1, 2, 3, 4])
def test_a_batch_that_cannot_be_decompressed_is_unreadable_and_raises_nothing(codec: int) -> None:
    corrupt = raw_batch((b"k", b"v" * 100, []), codec=codec)
    corrupt[BATCH_HEADER_BYTES:] = b"\x00" * len(corrupt[BATCH_HEADER_BYTES:])
    (record,) = records_in(bytes(signed(corrupt)), 0)
    assert (record.offset, record.next_offset, record.unreadable is None) == (0, 1, False)


@pytest.mark.kafka
async def test_records_of_an_aborted_transaction_are_no_records(kafka_bench: Bench, unique: Unique) -> None:
    """Those beside one that the client cannot parse come through our own parser."""
    bench, topic = kafka_bench, kafka_bench.settings.topics.jobs
    writer = AIOKafkaProducer(bootstrap_servers=bench.bootstrap_servers, transactional_id=unique("txn"))
    await writer.start()
    try:
        for job_id, is_kept in (("aborted", False), ("kept", True), ("aborted-too", False), ("kept-too", True)):
            await writer.begin_transaction()
            await writer.send_and_wait(topic, job(job_id), partition=0)
            await (writer.commit_transaction() if is_kept else writer.abort_transaction())
        await send_raw(bench, (None, b"v", [(NAMES[0], b"x")]))
    finally:
        await writer.stop()
    async with bench.working(EchoEngine()):
        letters = await bench.dead_letters(1)
        results = await bench.results(2)
        await eventually(lambda: reached(bench, 9))
    assert set(results) == {"kept", "kept-too"}
    assert letters[0][1] == b"v"


async def test_readers_of_results_and_dead_letters_skip_what_they_cannot_parse(bench: Bench) -> None:
    topics = bench.settings.topics
    await bench.send({"job_id": "good", "prompt": "p"}, b"{not json")
    for topic in (topics.results, topics.dead_letters):
        for partition in (0, 1):
            await send_raw(bench, (None, b"v", [(NAMES[0], b"x")]), topic=topic, partition=partition)
    async with bench.working(EchoEngine()):
        await eventually(lambda: reached(bench, 2))
    async with ResultReader(bench.settings, from_beginning=True, dead_letters=True) as reader:
        outcomes: list[Result | DeadLetter] = []
        async with asyncio.timeout(30):
            while len(outcomes) < 2:
                outcomes += await reader.read()
    assert {type(outcome) for outcome in outcomes} == {Result, DeadLetter}
    assert [buried.value async for buried in read_dead_letters(bench.settings, LetterFilter())] == [b"{not json"]


@pytest.mark.kafka
@pytest.mark.parametrize("codec", CODECS)
async def test_every_compression_that_producers_use_can_be_read(kafka_bench: Bench, codec: str) -> None:
    compression = None if codec == "none" else codec
    producer = AIOKafkaProducer(bootstrap_servers=kafka_bench.bootstrap_servers, compression_type=compression)
    await producer.start()
    try:
        await producer.send_and_wait(kafka_bench.settings.topics.jobs, job(codec), partition=0)
    finally:
        await producer.stop()
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka_bench.bootstrap_servers, auto_offset_reset="earliest")
    consumer.assign([TopicPartition(kafka_bench.settings.topics.jobs, 0)])
    async with consumer:
        assert (await consumer.getone()).value == job(codec)
