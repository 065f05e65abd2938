from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    NotEnoughReplicasError,
    OutOfOrderSequenceNumber,
    TopicAuthorizationFailedError,
)
from hypothesis import given
from hypothesis import strategies as st
from parts import create_topic
from sample_messages import SOURCE, dead_letter, metrics, result
from strategies import job_ids

from nanovllm.errors import BrokersUnavailable, MessageTooLarge, TransientError
from nanovllm.kafka.batch_send import send_batches
from nanovllm.kafka.client import producer_kwargs
from nanovllm.kafka.errors import publish_error
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.kafka.recovering_producer import RecoveringProducer
from nanovllm.messages.base import Source
from nanovllm.messages.encoding import MessageFormat
from nanovllm.messages.result import Result, result_id_for
from nanovllm.settings.tenants import TenantSettings
from nanovllm.sinks.cloud_events import event_record
from nanovllm.sinks.dead_letter_record import (
    MIN_TOPIC_BYTES,
    dead_letter_like,
    dead_letter_record,
    read_dead_letter,
    without_url_queries,
)
from nanovllm.sinks.kafka import KafkaSink, Unsent, send_record


@pytest.mark.parametrize(("fmt", "content_type"), [("json", b"application/json"), ("msgpack", b"application/msgpack")])
def test_a_result_is_a_cloud_event_in_binary_mode(fmt: MessageFormat, content_type: bytes) -> None:
    record = event_record(result(), "nanovllm.results", fmt, (("traceparent", b"00-abc"), ("authorization", b"x")))
    headers = dict(record.headers)
    assert record.key == b"r-1"
    assert headers["ce_specversion"] == b"1.0"
    assert headers["ce_id"] == result_id_for("r-1").encode()
    assert headers["ce_type"] == b"nanovllm.result.v1"
    assert headers["ce_subject"] == b"r-1"
    assert headers["ce_source"] == b"/nanovllm/nanovllm.jobs/3"
    assert datetime.fromisoformat(headers["ce_time"].decode()).tzinfo is not None
    assert headers["content-type"] == content_type
    assert headers["traceparent"] == b"00-abc"
    assert "authorization" not in headers


def test_metrics_are_keyed_by_their_job() -> None:
    record = event_record(metrics(), "nanovllm.metrics", "json")
    assert (record.key, dict(record.headers)["ce_type"]) == (b"r-1", b"nanovllm.metrics.v1")


def test_a_dead_letter_is_the_original_value_with_its_envelope_in_the_headers() -> None:
    value = b'{"prompt": \xff\x00 broken'
    record = dead_letter_record(dead_letter(), "dead", key=b"k", value=value)
    headers = {name: content.decode() for name, content in record.headers}
    assert (record.topic, record.key, record.value) == ("dead", b"k", value)
    assert headers == {
        "nanovllm_version": "1",
        "nanovllm_job_id": "r-1",
        "nanovllm_code": "invalid_image",
        "nanovllm_class": "invalid",
        "nanovllm_stage": "prepare",
        "nanovllm_message": "the image is cut off",
        "nanovllm_retryable": "false",
        "nanovllm_attempts": "2",
        "nanovllm_source_topic": "nanovllm.jobs",
        "nanovllm_source_partition": "3",
        "nanovllm_source_offset": "17",
        "nanovllm_source_timestamp_ms": "1700000000000",
        "nanovllm_worker": "w-1",
        "nanovllm_received_at": "2030-01-31T12:00:00.123Z",
        "nanovllm_failed_at": "2030-01-31T12:00:01.000Z",
    }


def test_a_dead_letter_is_read_back_from_its_headers() -> None:
    for letter in (dead_letter(), dead_letter(job_id=None, source=SOURCE.model_copy(update={"timestamp_ms": None}))):
        record = dead_letter_record(letter, "dead", key=None, value=b"x")
        assert read_dead_letter(record.headers) == letter


def test_only_allow_listed_headers_of_the_original_travel_on() -> None:
    original = (
        ("traceparent", b"00-abc"),
        ("Content-Type", b"application/json"),
        ("authorization", b"Bearer hunter2"),
        ("cookie", b"hunter2"),
        ("nanovllm_job_id", b"forged"),
        ("tracestate", b"x" * 5_000),
    )
    record = dead_letter_record(dead_letter(), "dead", key=None, value=b"", original_headers=original)
    names = [name for name, _ in record.headers]
    assert b"hunter2" not in b"".join(value for _, value in record.headers)
    assert names.count("nanovllm_job_id") == 1
    assert dict(record.headers)["nanovllm_job_id"] == b"r-1"
    assert dict(record.headers)["Content-Type"] == b"application/json"
    assert "tracestate" not in names
    assert dict(record.headers)["nanovllm_headers_left_out"] == b"4"


def test_headers_that_the_settings_name_are_kept_and_ours_are_never_taken_from_the_original() -> None:
    original = (("Tenant", b"a"), ("other", b"b"), ("nanovllm_code", b"forged"))
    record = dead_letter_record(
        dead_letter(), "dead", key=None, value=b"", original_headers=original, keep_headers=("tenant", "nanovllm_code")
    )
    assert ("Tenant", b"a") in record.headers
    assert [value for name, value in record.headers if name == "nanovllm_code"] == [b"invalid_image"]
    assert "other" not in dict(record.headers)


@pytest.mark.parametrize(
    "original",
    [
        (("traceparent", b"00-ab"), ("Tenant", b"acme")),
        (*(("traceparent", b"%d" % number) for number in range(1_100)), ("TENANT", b"acme")),
        (("tenant", b"a" * 5_000), ("tenant", b"victim")),
        (("tenant", "\u00e4".encode() * 500), ("traceparent", b"x" * 1_000)),
        (("tenant", b""), ("tenant", b"victim")),
    ],
)
@pytest.mark.parametrize("max_bytes", [1_500, 3_000, 1_000_000])
def test_a_dead_letter_names_the_tenant_that_the_job_had_whatever_else_is_cut(
    original: tuple[tuple[str, bytes], ...], max_bytes: int
) -> None:
    tenants = TenantSettings(header="tenant")
    record = dead_letter_record(
        dead_letter(message="m" * 900),
        "dead",
        key=b"k" * 2_000,
        value=b"v" * 9_000,
        original_headers=original,
        keep_headers=("tenant",),
        tenant=tenants.header_of(original),
        max_bytes=max_bytes,
    )
    assert record.size_bytes <= max_bytes
    assert tenants.tenant_of("jobs", record.headers) == tenants.tenant_of("jobs", original)
    kept = [name for name, _ in record.headers if not name.startswith("nanovllm_")]
    assert len([name for name in kept if name.lower() == "tenant"]) == 1
    assert len(original) - len(kept) == int(dict(record.headers).get("nanovllm_headers_left_out", b"0"))


def test_no_header_of_the_workers_own_names_a_tenant() -> None:
    with pytest.raises(ValueError, match="nanovllm_"):
        TenantSettings(header="NanoVLLM_tenant")


def test_no_url_query_and_no_login_reaches_a_dead_letter() -> None:
    message = (
        "GET https://user:hunter2@s3.example/bucket/k.png?X-Amz-Signature=hunter2#frag failed,\nsee s3://b/k?v=hunter2"
    )
    record = dead_letter_record(dead_letter(message=message), "dead", key=None, value=b"")
    sent = dict(record.headers)["nanovllm_message"].decode()
    assert sent == "GET https://s3.example/bucket/k.png failed, see s3://b/k"


def test_text_without_urls_is_left_alone() -> None:
    assert without_url_queries("why? a#b c:/d?e") == "why? a#b c:/d?e"


@given(
    value=st.binary(max_size=5_000),
    key=st.none() | st.binary(max_size=12_000),
    message=st.text(max_size=3_000),
    job_id=st.none() | job_ids,
    headers=st.lists(
        st.tuples(st.sampled_from(["traceparent", "Content-Type", "kept", "other"]), st.binary(max_size=1_500)),
        max_size=50,
    ),
    max_bytes=st.integers(4_000, 10_000),
)
def test_a_dead_letter_never_exceeds_its_limit(
    value: bytes, key: bytes | None, message: str, job_id: str | None, headers: list[tuple[str, bytes]], max_bytes: int
) -> None:
    letter = dead_letter(message=message, job_id=job_id)
    options = {"original_headers": tuple(headers), "keep_headers": ("kept",), "max_bytes": max_bytes}
    record = dead_letter_record(letter, "dead", key=key, value=value, **options)
    assert record.size_bytes <= max_bytes
    own = dict(record.headers)
    kept = [header for header in record.headers if not header[0].startswith("nanovllm_")]
    assert len(headers) - len(kept) == int(own.get("nanovllm_headers_left_out", b"0"))
    if record.value != value or record.key != key:
        assert value.startswith(record.value)
        assert own["nanovllm_value_truncated"] == b"true"
        assert own["nanovllm_value_sha256"].decode() == hashlib.sha256(value).hexdigest()
        assert own["nanovllm_value_size"].decode() == str(len(value))
        assert own["nanovllm_source_offset"] == b"17"


def test_the_largest_envelope_fits_into_the_smallest_topic_that_the_check_lets_pass() -> None:
    widest = "\U0001f600"
    now = datetime.now(UTC)
    letter = dead_letter(
        job_id=widest * 512,
        message=widest * 2_000,
        code="c" * 64,
        error_class="retries_exhausted",
        cause="E" * 100 + " in nanovllm." + "m" * 100 + ":100000",
        attempts=10**9,
        replays=9_999,
        retryable=True,
        source=Source(topic="t" * 249, partition=2**31 - 1, offset=2**63 - 1, timestamp_ms=2**63 - 1),
        worker="w" * 253,
        received_at=now,
        first_failed_at=now,
        failed_at=now,
    )
    headers = tuple((name, b"x" * 1_000) for name in ("Tenant", "traceparent", "tracestate"))
    tenant = TenantSettings(header="tenant").header_of(headers)
    record = dead_letter_record(
        letter,
        "dead",
        key=b"k" * 10_000,
        value=b"v" * 10_000,
        original_headers=headers,
        tenant=tenant,
        max_bytes=MIN_TOPIC_BYTES,
    )
    assert record.size_bytes <= MIN_TOPIC_BYTES
    assert dict(record.headers)["nanovllm_message"].decode() == widest * 1_000
    assert tenant in record.headers


def test_headers_that_are_too_many_or_too_long_together_stay_out_of_whatever_is_sent() -> None:
    many = tuple(("traceparent", b"%d" % number) for number in range(1_100))
    long = tuple(("tracestate", b"x" * 1_000) for _ in range(1_100))
    for headers, kept in ((many, 32), (long, 8)):
        letter = dead_letter_record(dead_letter(), "dead", key=None, value=b"v", original_headers=headers)
        assert [name for name, _ in letter.headers if name.startswith("trace")] == [headers[0][0]] * kept
        assert letter.value == b"v"
        assert dict(letter.headers)["nanovllm_headers_left_out"].decode() == str(1_100 - kept)
        record = event_record(result(), "results", "json", headers)
        assert sum(name.startswith("trace") for name, _ in record.headers) == kept


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (KafkaTimeoutError(), TransientError),
        (KafkaConnectionError(), TransientError),
        (NotEnoughReplicasError(), TransientError),
        (MessageSizeTooLargeError(), MessageTooLarge),
        (TopicAuthorizationFailedError(), BrokersUnavailable),
        (OutOfOrderSequenceNumber(), TransientError),
    ],
)
def test_every_refusal_of_the_broker_has_a_class(error: KafkaError, meaning: type[Exception]) -> None:
    assert type(publish_error(error, "t")) is meaning


async def test_published_records_are_there_when_publish_returns(
    embedded_broker: str, unique: Callable[[str], str]
) -> None:
    topic = unique("results")
    producer = AIOKafkaProducer(bootstrap_servers=embedded_broker, enable_idempotence=True)
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=embedded_broker, auto_offset_reset="earliest")
    await producer.start()
    try:
        sink = KafkaSink(producer)
        await sink.publish([event_record(result(job_id=f"r-{n}"), topic, "json") for n in range(20)])
        await consumer.start()
        seen: list[Result] = []
        while len(seen) < 20:
            for records in (await consumer.getmany(timeout_ms=500)).values():
                seen += [Result.model_validate_json(record.value) for record in records]
        assert {message.job_id for message in seen} == {f"r-{n}" for n in range(20)}
    finally:
        await consumer.stop()
        await producer.stop()


async def test_a_record_above_its_topics_limit_is_refused_before_anything_is_sent(
    embedded_broker: str, unique: Callable[[str], str]
) -> None:
    topic = unique("results")
    producer = AIOKafkaProducer(bootstrap_servers=embedded_broker, enable_idempotence=True)
    await producer.start()
    try:
        sink = KafkaSink(producer, {topic: 1_000})
        small, large = OutgoingRecord(topic, None, b"small"), OutgoingRecord(topic, None, b"x" * 1_000)
        with pytest.raises(MessageTooLarge, match="1000"):
            await sink.publish([small, large])
        await sink.publish([small])
    finally:
        await producer.stop()


@pytest.mark.kafka
async def test_a_message_fitted_to_a_topics_own_limit_is_taken_and_the_producer_goes_on(
    kafka_broker: str, unique: Callable[[str], str]
) -> None:
    from nanovllm.kafka.admin import message_limits
    from nanovllm.settings.kafka import KafkaSettings

    topic = unique("dead")
    await create_topic(kafka_broker, topic, partitions=1, settings={"max.message.bytes": "20000"})
    kafka = KafkaSettings(bootstrap_servers=kafka_broker)
    limits = await message_limits(kafka, [topic])
    assert limits == {topic: 20_000}
    producer = AIOKafkaProducer(**producer_kwargs(kafka))
    await producer.start()
    try:
        sink = KafkaSink(producer, limits)
        for size in (10, 19_000, 200_000, 10):
            record = dead_letter_record(
                dead_letter(), topic, key=b"k", value=b"v" * size, max_bytes=sink.limits.record_bytes(topic)
            )
            await sink.publish([record])
    finally:
        await producer.stop()


@pytest.mark.kafka
async def test_a_producer_whose_numbers_the_broker_no_longer_takes_is_replaced(
    kafka_broker: str, unique: Callable[[str], str]
) -> None:
    topic = unique("dead")
    await create_topic(kafka_broker, topic, partitions=1, settings={"max.message.bytes": "1000"})
    made: list[AIOKafkaProducer] = []

    def connect() -> AIOKafkaProducer:
        made.append(AIOKafkaProducer(bootstrap_servers=kafka_broker, enable_idempotence=True, acks="all"))
        return made[-1]

    producer = RecoveringProducer(connect)
    await producer.start()
    try:
        sink = KafkaSink(producer)
        await sink.publish([OutgoingRecord(topic, b"k", b"small")])
        # aiokafka has counted the record that the broker refuses; whatever follows is out of order.
        with pytest.raises(MessageTooLarge):
            await send_record(producer, OutgoingRecord(topic, b"k", b"x" * 5_000))
        with pytest.raises(TransientError, match="replaced"):
            await sink.publish([OutgoingRecord(topic, b"k", b"small")])
        await asyncio.gather(*(sink.publish([OutgoingRecord(topic, b"k", b"small")]) for _ in range(5)))
    finally:
        await producer.stop()
    assert len(made) == 2


@pytest.mark.kafka
async def test_of_records_sent_together_those_that_are_acknowledged_are_not_sent_again(
    kafka_broker: str, unique: Callable[[str], str]
) -> None:
    topic = unique("dead")
    await create_topic(kafka_broker, topic, partitions=4, settings={"max.message.bytes": "4000"})
    records = [OutgoingRecord(topic, b"key-%d" % (n % 7), b"%d" % n) for n in range(40)]
    records.append(OutgoingRecord(topic, b"key-0", random.Random(1).randbytes(5_000)))
    producer = RecoveringProducer(lambda: AIOKafkaProducer(bootstrap_servers=kafka_broker, enable_idempotence=True))
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka_broker, auto_offset_reset="earliest")
    await producer.start()
    await consumer.start()
    try:
        unsent = Unsent(KafkaSink(producer), records)

        async def send_again_and_again() -> None:
            while True:
                with suppress(TransientError):  # whole batches are refused until the limit is known
                    await unsent()

        with pytest.raises(MessageTooLarge):
            await asyncio.wait_for(send_again_and_again(), timeout=60)
        refused = {record.value for record in unsent.records}
        assert records[-1].value in refused
        assert len(refused) < len(records)
        parts = [TopicPartition(topic, number) for number in range(4)]
        consumer.assign(parts)
        ends = await consumer.end_offsets(parts)
        seen: list[bytes] = []
        while any([await consumer.position(tp) < end for tp, end in ends.items()]):
            for batch in (await consumer.getmany(timeout_ms=500)).values():
                seen += [record.value for record in batch if record.value is not None]
    finally:
        await consumer.stop()
        await producer.stop()
    assert len(seen) == len(set(seen))
    assert {record.value for record in records} - refused <= set(seen)


def test_a_dead_letter_made_like_another_one_is_the_one_made_by_itself() -> None:
    first, second = (
        dead_letter(job_id=f"jobs:0:{offset}", source=Source(topic="jobs", partition=0, offset=offset, timestamp_ms=at))
        for offset, at in ((17, 1_000), (18, 2_000))
    )
    like = dead_letter_record(first, "dead", key=b"a", value=b"{")
    differing = {"job_id": "jobs:0:18", "source_offset": 18, "source_timestamp_ms": 2_000}
    assert dead_letter_like(like, differing, key=b"b", value=b"[") == dead_letter_record(
        second, "dead", key=b"b", value=b"["
    )


def test_no_dead_letter_is_made_like_one_that_was_cut_or_lacks_a_field() -> None:
    cut = dead_letter_record(dead_letter(), "dead", key=None, value=b"x" * 5_000, max_bytes=2_000)
    assert dead_letter_like(cut, {"source_offset": 18}, key=None, value=b"y") is None
    whole = dead_letter_record(dead_letter(), "dead", key=None, value=b"x")
    assert dead_letter_like(whole, {"source_offset": 18, "source_timestamp_ms": None}, key=None, value=b"y") is None
    assert dead_letter_like(whole, {"no_such_field": 1}, key=None, value=b"y") is None


async def test_records_sent_together_lie_where_each_would_lie_alone_and_in_order(
    embedded_broker: str, unique: Callable[[str], str]
) -> None:
    topic = unique("dead")
    await create_topic(embedded_broker, topic, partitions=4)
    records = [OutgoingRecord(topic, b"key-%d" % (n % 7), b"%d" % n, (("n", b"%d" % n),)) for n in range(100)]
    producer = AIOKafkaProducer(bootstrap_servers=embedded_broker, enable_idempotence=True, acks="all")
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=embedded_broker, auto_offset_reset="earliest")
    await producer.start()
    try:
        alone = {record.key: (await producer.send_and_wait(topic, b"", key=record.key)).partition for record in records}
        # So small a limit that each partition needs several batches.
        await send_batches(producer, topic, records, 1_000)
        await consumer.start()
        seen = []
        while len(seen) < len(records):
            for batch in (await consumer.getmany(timeout_ms=500)).values():
                seen += [record for record in batch if record.value]
    finally:
        await consumer.stop()
        await producer.stop()
    assert all(record.partition == alone[record.key] for record in seen)
    assert all(record.headers == (("n", record.value),) for record in seen)
    for key in alone:
        order = [int(record.value) for record in seen if record.key == key]
        assert order == [n for n in range(100) if b"key-%d" % (n % 7) == key]
