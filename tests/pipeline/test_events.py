"""Events of every dialect: golden messages, bounds, AWS's models as an oracle, a real S3 server's own notifications."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from datetime import UTC, datetime, timedelta
from hashlib import md5
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pytest
from aiokafka import AIOKafkaConsumer
from hypothesis import given
from hypothesis import strategies as st
from parts import VersityNode, create_topic, unique_name

from nanovllm.errors import InvalidEvent
from nanovllm.pipeline.events import envelope
from nanovllm.pipeline.events.envelope import parse_events, split_events
from nanovllm.pipeline.events.event import ObjectEvent, is_newer

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "events"
CASES = {path.stem: json.loads(path.read_text()) for path in sorted(GOLDEN.glob("*.json"))}


def message_of(case: dict[str, Any]) -> bytes:
    return case["text"].encode() if "text" in case else json.dumps(case["message"]).encode()


def as_fields(event: ObjectEvent) -> dict[str, Any]:
    fields = dataclasses.asdict(event)
    return fields | {"event_time": event.event_time.isoformat() if event.event_time else None}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "events" in case])
def test_a_golden_message_is_read_as_its_dialect_means_it(name: str) -> None:
    assert [as_fields(event) for event in parse_events(message_of(CASES[name]))] == CASES[name]["events"]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "error" in case])
def test_a_message_that_is_no_event_says_why(name: str) -> None:
    with pytest.raises(InvalidEvent) as raised:
        parse_events(message_of(CASES[name]))
    assert CASES[name]["error"] in str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "events" in case])
def test_each_event_alone_is_a_message_with_the_same_event(name: str) -> None:
    for event, alone in split_events(message_of(CASES[name])):
        assert parse_events(alone) == [event]


def record(key: str = "a.pdf", *, is_encoded: bool = True) -> dict[str, Any]:
    subject = {"key": quote_plus(key) if is_encoded else key, "size": 1, "eTag": "e", "sequencer": "01"}
    s3 = {"bucket": {"name": "receipts", "arn": "arn:aws:s3:::receipts"}, "object": subject}
    return {"eventVersion": "2.1", "eventSource": "aws:s3", "eventName": "ObjectCreated:Put", "s3": s3}


def test_a_message_above_the_limit_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelope, "decode_json", lambda _: pytest.fail("it was parsed"))
    with pytest.raises(InvalidEvent, match="above the limit"):
        parse_events(b" " * (envelope.MAX_MESSAGE_BYTES + 1))


def test_a_message_of_too_many_events_is_refused() -> None:
    most = [record()] * envelope.MAX_EVENTS
    assert len(parse_events(json.dumps({"Records": most}).encode())) == envelope.MAX_EVENTS
    with pytest.raises(InvalidEvent, match="more than 1000 events"):
        parse_events(json.dumps({"Records": [*most, record()]}).encode())


def test_a_message_of_too_many_values_is_refused() -> None:
    with pytest.raises(InvalidEvent, match="more than 100000 values"):
        parse_events(json.dumps({"Records": [0] * 100_001}).encode())


def test_parsing_costs_at_most_so_many_times_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    decode = envelope.decode_json
    monkeypatch.setattr(envelope, "decode_json", lambda text: (parsed.append(len(text)), decode(text))[1])
    message = json.dumps([record()] * 10)
    for _ in range(envelope.MAX_TEXTS - 1):
        message = json.dumps({"messageId": "1", "body": message})
    parse_events(message.encode())
    assert len(parsed) == envelope.MAX_TEXTS
    assert sum(parsed) <= envelope.MAX_TEXTS * len(message)


@given(st.text(min_size=1).filter(lambda key: key.isprintable() or "\n" in key))
def test_any_key_comes_back_from_every_dialect(key: str) -> None:
    events = [
        {"Records": [record(key)]},
        {"Records": [record(key) | {"eventSource": "minio:s3"}]},
        {"Records": [record(key, is_encoded=False) | {"eventSource": "ceph:s3"}]},
        {
            "detail-type": "Object Created",
            "source": "aws.s3",
            "detail": {"bucket": {"name": "b"}, "object": {"key": key}},
        },
    ]
    versity = record(key, is_encoded=False)
    versity["s3"]["bucket"]["arn"] = f"arn:aws:s3:::/receipts/{key}"
    assert [event.key for event in parse_events(json.dumps([*events, versity]).encode())] == [key] * 5


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ("Records", "s3", "eventName", "body", "messageId", "Message", "TopicArn", "detail", "object")
                )
                | st.sampled_from(
                    ("specversion", "data", "detail-type", "source", "bucket", "key", "name", "size", "Event")
                ),
                inner | st.just("aws.s3") | st.just("ObjectCreated:Put") | st.just("s3:TestEvent"),
                max_size=5,
            )
        ),
    )
)
def test_whatever_json_comes_it_is_read_or_refused_as_no_event(value: Any) -> None:
    with contextlib.suppress(InvalidEvent):
        assert parse_events(json.dumps(value).encode())


@given(st.binary(max_size=64))
def test_whatever_bytes_come_they_are_refused_as_no_event(value: bytes) -> None:
    with pytest.raises(InvalidEvent):
        parse_events(value)


NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)


def event(sequencer: str | None, dialect: Any = "aws", *, after_s: float | None = 0.0, **fields: Any) -> ObjectEvent:
    time = None if after_s is None else NOON + timedelta(seconds=after_s)
    values = {"bucket": "receipts", "key": "a.pdf", "version_id": None, "etag": sequencer} | fields
    return ObjectEvent(
        **values,
        sequencer=sequencer,
        size=1,
        event_time=time,
        kind="created",
        name="ObjectCreated:Put",
        dialect=dialect,
    )


def ceph_sequencer(seconds: int, nanoseconds: int) -> str:
    return (seconds.to_bytes(4, "little") + nanoseconds.to_bytes(4, "little")).hex().upper()


MINIO, LATER_MINIO = f"{1_764_500_000 * 10**9:X}", f"{1_764_500_003 * 10**9:X}"


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        (event("0055AED6DCD90281E5"), event("0055AED6DCD90281E6")),
        (event("0055AED6DC"), event("0055AED6DCD90281E5")),  # padded on the right
        (event("0055aed6dd"), event("0055AED6DE")),
        (event("0055AED6DCD9"), event("0055AED6DD", "eventbridge")),
        (event("FF"), event("FF01")),
        (event(MINIO, "minio"), event(LATER_MINIO, "minio")),
        # Ceph's own bytes: as one number or as text, the first would be the greater one.
        (event(ceph_sequencer(0x5DD7E6F7, 999), "ceph"), event(ceph_sequencer(0x5DD7E700, 1), "ceph")),
        (event("9", "versity"), event("A", "versity")),
        (event("F", "versity"), event("10", "versity", after_s=1)),
        (event("FF", "versity"), event("1", "versity", after_s=60)),  # the server was started again
        (event("7", "versity", etag="x"), event("7", "versity", etag="y", after_s=60)),
    ],
)
def test_the_later_of_two_events_is_newer(older: ObjectEvent, newer: ObjectEvent) -> None:
    assert (is_newer(newer, older), is_newer(older, newer)) == (True, False)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (event("01"), event("02", key="b.pdf")),
        (event("01"), event("02", bucket="others")),
        (event(None), event("02")),
        (event("xyz"), event("02")),
        (event("01", etag="a"), event("01", etag="b")),
        (event("0100", etag="a"), event("01", etag="a")),
        (event("01"), event(MINIO, "minio")),
        (event(MINIO, "minio"), event(f"{1_764_500_000 * 10**9 + 10**8:X}", "minio")),  # within the clocks' skew
        (event("00FF", "ceph"), event("00FE", "ceph")),
        (event("1", "versity", after_s=None), event("2", "versity", after_s=None)),
        (event("2", "versity"), event("1", "versity", after_s=1)),
        (event("01", "other"), event("02", "other")),
    ],
)
def test_what_cannot_be_told_is_none(one: ObjectEvent, other: ObjectEvent) -> None:
    assert is_newer(one, other) is None
    assert is_newer(other, one) is None


def test_a_second_delivery_of_an_event_is_not_newer() -> None:
    assert is_newer(event("01"), event("01")) is False
    assert is_newer(event("01", "other"), event("01", "other")) is False
    # Versions that are written while versioning is suspended share their id.
    first, second = (event("01", "other", version_id="null", etag=etag) for etag in ("a", "b"))
    assert is_newer(second, first) is None


def test_cephs_own_example_has_the_time_of_its_event() -> None:
    """The sequencer in Ceph's documentation, F7E6D75DC742D108, stands beside 2019-11-22T13:47:35.124724Z."""
    documented = event("F7E6D75DC742D108", "ceph")
    second = int(datetime(2019, 11, 22, 13, 47, 35, tzinfo=UTC).timestamp())
    assert is_newer(documented, event(ceph_sequencer(second - 2, 0), "ceph"))
    assert is_newer(event(ceph_sequencer(second + 2, 0), "ceph"), documented)


def records_of(case: str) -> list[dict[str, Any]]:
    return [one for part in [CASES[case]["message"]] for one in (part if isinstance(part, list) else part["Records"])]


NAMES = (
    *(
        "Records",
        "s3",
        "detail",
        "detail-type",
        "eventName",
        "source",
        "Event",
        "Message",
        "body",
        "specversion",
        "data",
    ),
    *("eventVersion", "eventTime", "bucket", "object", "name", "key", "size", "eTag", "versionId", "sequencer"),
)
TEXTS = st.text(max_size=8) | st.sampled_from(["aws.s3", "Object Created", "2.1"])
PARTS = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6),
    max_leaves=20,
)


@given(PARTS)
def test_a_message_of_whatever_parts_is_events_or_no_event(message: object) -> None:
    with contextlib.suppress(InvalidEvent):
        assert split_events(json.dumps(message).encode())


@pytest.mark.parametrize("s3", [[], "text", None, 7])
def test_a_message_of_two_forms_is_read_by_the_one_that_it_has(s3: object) -> None:
    detail = {"bucket": {"name": "b"}, "object": {"key": "k"}}
    message = {"source": "aws.s3", "detail-type": "Object Created", "detail": detail, "s3": s3}
    [(event, alone)] = split_events(json.dumps(message).encode())
    assert (event.bucket, event.key, event.dialect) == ("b", "k", "eventbridge")
    assert parse_events(alone) == [event]


@pytest.mark.parametrize("case", ["aws-keys", "aws-versions", "aws-removed-and-other"])
def test_powertools_agrees_about_records(case: str) -> None:
    models = pytest.importorskip("aws_lambda_powertools.utilities.parser.models", reason="the extra dev has it")
    model = models.S3Model.model_validate(CASES[case]["message"])
    for theirs, ours in zip(model.Records, parse_events(message_of(CASES[case])), strict=True):
        subject = theirs.s3.object or theirs.s3.get_object
        assert (theirs.s3.bucket.name, subject.key) == (ours.bucket, records_key(ours.key))
        assert (subject.versionId, subject.eTag, subject.sequencer) == (ours.version_id, ours.etag, ours.sequencer)
        assert (subject.size, theirs.eventTime, theirs.eventName) == (ours.size, ours.event_time, ours.name)


def records_key(key: str) -> str:
    """A key in AWS's form encoding; Powertools leaves it encoded."""
    return quote_plus(key, safe="/")


def test_powertools_agrees_about_eventbridge() -> None:
    models = pytest.importorskip("aws_lambda_powertools.utilities.parser.models", reason="the extra dev has it")
    for message in (*records_of("eventbridge-keys"), *records_of("eventbridge-others")[:3]):
        theirs = models.S3EventNotificationEventBridgeModel.model_validate(message)
        (ours,) = parse_events(json.dumps(message).encode())
        subject = theirs.detail.object
        assert (theirs.detail.bucket.name, subject.key, theirs.time) == (ours.bucket, ours.key, ours.event_time)
        assert (subject.version_id, subject.sequencer) == (ours.version_id, ours.sequencer)
        assert (subject.size, subject.etag or None, theirs.detail_type) == (ours.size, ours.etag, ours.name)


@pytest.mark.parametrize(
    ("case", "name"), [("sqs", "S3SqsEventNotificationModel"), ("sqs-sns-raw", "S3SqsEventNotificationModel")]
)
def test_powertools_agrees_about_sqs(case: str, name: str) -> None:
    models = pytest.importorskip("aws_lambda_powertools.utilities.parser.models", reason="the extra dev has it")
    model = getattr(models, name).model_validate(CASES[case]["message"])
    theirs = [record.s3.object.sequencer for outer in model.Records for record in outer.body.Records]
    assert theirs == [event.sequencer for event in parse_events(message_of(CASES[case]))]


def test_powertools_agrees_about_sns() -> None:
    models = pytest.importorskip("aws_lambda_powertools.utilities.parser.models", reason="the extra dev has it")
    model = models.SnsModel.model_validate(CASES["sns-lambda"]["message"])
    inner = model.Records[0].Sns.Message
    assert parse_events(inner.encode()) == parse_events(message_of(CASES["sns-lambda"]))


KEYS = ["plain.pdf", "a b/50+ü &%日本.pdf", "x:y/z%2Fq.pdf", "a%20b+c.pdf", "in/a/deep/prefix/😀.pdf"]


@pytest.mark.s3
@pytest.mark.kafka
async def test_a_real_s3_servers_own_notifications_are_read(kafka_broker: str, tmp_path: Path) -> None:
    topic = unique_name("events")
    await create_topic(kafka_broker, topic, partitions=1)
    node = VersityNode(tmp_path, notifies=(kafka_broker, topic))
    try:
        part = node.start()
        bucket = part.make_bucket(versioned=True)
        for key in KEYS:
            part.put(bucket, key, b"content")
        part.client.copy_object(Bucket=bucket, Key="a copy.pdf", CopySource={"Bucket": bucket, "Key": KEYS[0]})
        part.put(bucket, KEYS[0], b"newer")
        part.client.put_object_tagging(Bucket=bucket, Key=KEYS[0], Tagging={"TagSet": [{"Key": "a", "Value": "b"}]})
        part.client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": KEYS[1]}]})
        events = await _events(kafka_broker, topic, 1 + len(KEYS) + 4)

        # In whatever order: the server sends each by itself.
        assert sorted(one.kind for one in events) == sorted(
            [*["created"] * (len(KEYS) + 2), "other", "removed", "test"]
        )
        assert {one.dialect for one in events if one.kind != "test"} == {"versity"}
        assert {one.kind: one.key for one in events if one.kind != "created"} == {
            "test": "",
            "other": KEYS[0],
            "removed": KEYS[1],
        }
        created = {(one.key, one.etag): one for one in events if one.kind == "created"}
        assert created.keys() == {
            *((key, md5(b"content").hexdigest()) for key in [*KEYS, "a copy.pdf"]),
            (KEYS[0], md5(b"newer").hexdigest()),
        }
        for key in KEYS[2:]:
            # What the event says is enough to read the very object, and no other.
            one = created[key, md5(b"content").hexdigest()]
            answer = part.client.get_object(Bucket=one.bucket, Key=one.key, IfMatch=one.etag)
            assert answer["ContentLength"] == one.size
        first, second = (created[KEYS[0], md5(content).hexdigest()] for content in (b"content", b"newer"))
        assert (is_newer(second, first), is_newer(first, second)) == (True, False)

        node.stop()
        part = node.start()
        await asyncio.sleep(2.1)  # its times have whole seconds, and within one of them nothing is told
        part.put(bucket, KEYS[0], b"after a start of the server")
        *_, last = sorted(
            [one for one in await _events(kafka_broker, topic, len(events) + 2) if one.key == KEYS[0]],
            key=lambda one: one.event_time or NOON,
        )
        assert (is_newer(last, second), is_newer(second, last)) == (True, False)
    finally:
        node.stop()


async def _events(broker: str, topic: str, count: int) -> list[ObjectEvent]:
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=broker, auto_offset_reset="earliest")
    await consumer.start()
    try:
        return [one for _ in range(count) for one in parse_events((await consumer.getone()).value)]
    finally:
        await consumer.stop()
