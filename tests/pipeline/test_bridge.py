"""The bridge from SQS (moto's) to Kafka: what it moves, and what a kill, a stop and a fault leave in the queue."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import boto3
import pytest
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from moto.core import DEFAULT_ACCOUNT_ID as ACCOUNT
from moto.sqs.models import sqs_backends
from parts import S3Part, create_topic, eventually, unique_name

from nanovllm.cli.main import main
from nanovllm.client.dead_letters import DeadLetterRecord
from nanovllm.demo.child_process import LocalProcess
from nanovllm.errors import ConfigurationError, CredentialsRefused, PoisonLimitReached, TransientError
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.kafka.recovering_producer import RecoveringProducer
from nanovllm.kafka.topic_limits import TopicLimits
from nanovllm.pipeline.events.envelope import parse_events
from nanovllm.pipeline.failure.backoff import Backoff
from nanovllm.pipeline.routing import bridge as bridge_module
from nanovllm.pipeline.routing import sqs
from nanovllm.pipeline.routing.bridge import Bridge
from nanovllm.pipeline.routing.sqs import SqsQueue
from nanovllm.settings.worker import Settings
from nanovllm.sinks.kafka import KafkaSink

KEYS = ["plain.pdf", "red flower.jpg", "a+b%20c.pdf", "日本/ü.pdf", "12:30/x:y.pdf", "in/a/deep/prefix/scan.tiff"]


def notification(*keys: str, bucket: str = "receipts") -> str:
    records = [
        {
            "eventVersion": "2.1",
            "eventSource": "aws:s3",
            "eventTime": "2026-11-30T04:24:18.123Z",
            "eventName": "ObjectCreated:Put",
            "s3": {"bucket": {"name": bucket}, "object": {"key": quote_plus(key), "size": 1, "eTag": "e"}},
        }
        for key in keys
    ]
    return json.dumps({"Records": records})


TEST_EVENT = json.dumps({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "receipts"})


@dataclass
class Setting:
    """A queue of moto's, two topics, and a bridge between them."""

    broker: str
    endpoint: str
    settings: Settings
    client: Any = field(init=False)
    url: str = field(init=False)

    def __post_init__(self) -> None:
        self.client = boto3.client("sqs", endpoint_url=self.endpoint, region_name="us-east-1")
        self.url = self.client.create_queue(QueueName=unique_name("queue"))["QueueUrl"]

    @classmethod
    async def on(cls, broker: str, endpoint: str) -> Setting:
        topics = {"events": unique_name("events"), "dead_letters": unique_name("dead")}
        await create_topic(broker, *topics.values(), partitions=2)
        topics["replayed"] = unique_name("replayed")
        settings = Settings.model_validate({"kafka": {"bootstrap_servers": broker}, "topics": topics})
        return cls(broker, endpoint, settings)

    def send(self, *bodies: str) -> None:
        for body in bodies:
            self.client.send_message(QueueUrl=self.url, MessageBody=body)

    def waiting(self) -> list[str]:
        """The bodies of the messages that are visible; they are gone from the queue afterwards."""
        bodies = []
        while messages := self.client.receive_message(QueueUrl=self.url, MaxNumberOfMessages=10).get("Messages"):
            for message in messages:
                bodies.append(message["Body"])
                self.client.delete_message(QueueUrl=self.url, ReceiptHandle=message["ReceiptHandle"])
        return bodies

    def counts(self) -> tuple[int, int]:
        """Visible and hidden messages."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        values = self.client.get_queue_attributes(QueueUrl=self.url, AttributeNames=names)["Attributes"]
        return int(values[names[0]]), int(values[names[1]])

    def hidden_until(self) -> float:
        """When the queue's only message is shown again, in moto's own words."""
        (message,) = sqs_backends[ACCOUNT]["us-east-1"].queues[self.url.rpartition("/")[2]]._messages
        return float(message.visible_at)

    @contextlib.asynccontextmanager
    async def bridge(self, make_sink: Callable[..., KafkaSink] = KafkaSink, **update: Any) -> AsyncIterator[Bridge]:
        topics = self.settings.topics
        limits = TopicLimits({topics.events: 20_000, topics.dead_letters: 1_000_000})
        producer = RecoveringProducer.within(self.settings.kafka, limits)
        queue = SqsQueue(self.url)
        await producer.start()
        try:
            settings = self.settings.model_copy(update=update)
            yield Bridge(settings, queue, make_sink(producer, limits), backoff=Backoff(0.01, 0.05))
        finally:
            await producer.stop()
            queue.close()

    async def records(self, topic: str) -> list[ConsumerRecord]:
        """All that is in ``topic`` now."""
        consumer = AIOKafkaConsumer(topic, bootstrap_servers=self.broker, auto_offset_reset="earliest")
        await consumer.start()
        try:
            found: list[ConsumerRecord] = []
            ends = await consumer.end_offsets(consumer.assignment())
            while len(found) < sum(ends.values()):
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    found += records
            return found
        finally:
            await consumer.stop()

    async def keys(self) -> list[str]:
        """Bucket and key of every event in its topic, as its record's key and as its value say."""
        found = []
        for record in await self.records(self.settings.topics.events):
            (event,) = parse_events(record.value)
            assert record.key.decode() == f"{event.bucket}/{event.key}"
            found.append(event.key)
        return found

    async def dead_letters(self) -> list[DeadLetterRecord]:
        records = await self.records(self.settings.topics.dead_letters)
        return [DeadLetterRecord.from_record(record) for record in records]

    def environment(self) -> dict[str, str]:
        names = {key: value for key, value in os.environ.items() if not key.startswith("NANOVLLM_")}
        topics = self.settings.topics
        return names | {
            "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": self.broker,
            "NANOVLLM_TOPICS__EVENTS": topics.events,
            "NANOVLLM_TOPICS__DEAD_LETTERS": topics.dead_letters,
            "NANOVLLM_TOPICS__REPLAYED": topics.replayed,
            "PYTHONUNBUFFERED": "1",
        }

    def process(self, directory: Path, *arguments: str, program: Sequence[str] = ()) -> LocalProcess:
        command = [sys.executable, *(program or ("-m", "nanovllm.cli.main")), "bridge", "sqs", self.url, *arguments]
        return LocalProcess("bridge", command, directory / "bridge.log", env=self.environment())


@pytest.fixture
async def setting(embedded_broker: str, s3: S3Part, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(sqs, "WAIT_S", 0)
    return await Setting.on(embedded_broker, s3.endpoint_url)


async def test_each_event_becomes_a_record_under_its_bucket_and_key(setting: Setting) -> None:
    sns = json.dumps({"Type": "Notification", "TopicArn": "arn:aws:sns:eu-central-1:1:t", "Message": notification("s")})
    setting.send(*(notification(key) for key in KEYS), notification("one", "two", "one"), sns, TEST_EVENT)
    async with setting.bridge() as bridge:
        await bridge.run(receivers=2, until_empty=True)
    assert sorted(await setting.keys()) == sorted([*KEYS, "one", "two", "one", "s"])
    moved = bridge.moved
    assert (moved.messages, moved.events, moved.test_events, moved.dead_letters) == (9, 10, 1, 0)
    assert setting.counts() == (0, 0)


async def test_what_a_bucket_notifies_arrives_with_its_keys(setting: Setting, s3: S3Part) -> None:
    bucket = s3.make_bucket()
    attributes = setting.client.get_queue_attributes(QueueUrl=setting.url, AttributeNames=["QueueArn"])["Attributes"]
    to_queue = {"QueueArn": attributes["QueueArn"], "Events": ["s3:ObjectCreated:*"]}
    s3.client.put_bucket_notification_configuration(
        Bucket=bucket, NotificationConfiguration={"QueueConfigurations": [to_queue]}
    )
    for key in KEYS:
        s3.put(bucket, key, b"content")
    async with setting.bridge() as bridge:
        await bridge.run(until_empty=True)
    assert sorted(await setting.keys()) == sorted(KEYS)
    for record in await setting.records(setting.settings.topics.events):
        (event,) = parse_events(record.value)
        head = s3.client.head_object(Bucket=event.bucket, Key=event.key)
        assert (head["ContentLength"], head["ETag"]) == (event.size, f'"{event.etag}"')


async def test_a_message_without_events_is_a_dead_letter_with_its_reason(setting: Setting) -> None:
    poison = ["no JSON, in UTF-8: ü", json.dumps({"prompt": "p"}), notification("")]
    setting.send(notification("before"), *poison, notification("after"))
    async with setting.bridge() as bridge:
        await bridge.run(until_empty=True)
    assert sorted(await setting.keys()) == ["after", "before"]
    letters = {letter.value: letter.letter for letter in await setting.dead_letters()}
    assert letters.keys() == {body.encode() for body in poison}
    assert {letter.code for letter in letters.values()} == {"invalid_event"}
    assert "no S3 event" in letters[poison[1].encode()].message
    assert "names no key" in letters[poison[2].encode()].message
    for letter in letters.values():
        assert letter.queue == setting.url.rpartition("/")[2]
        assert letter.message_id
        assert letter.source.topic == setting.settings.topics.events
        assert letter.attempts == 1
    assert len({letter.source.offset for letter in letters.values()}) == len(poison)  # a replay tells them apart
    assert setting.counts() == (0, 0)
    assert bridge.moved.dead_letters == 3


async def test_an_event_that_its_topic_does_not_take_is_a_dead_letter(setting: Setting) -> None:
    setting.send(notification("x" * 20_000, "small"), notification("fits"))
    async with setting.bridge() as bridge:
        await bridge.run(until_empty=True)
    assert await setting.keys() == ["fits"]
    (letter,) = await setting.dead_letters()
    assert letter.letter.code == "message_too_large"
    assert parse_events(letter.value or b"")[1].key == "small"


async def test_a_queue_of_something_else_is_not_emptied(setting: Setting) -> None:
    setting.send(*(f"poison {number}" for number in range(9)))
    limited = setting.settings.dead_letters.model_copy(update={"poison_limit": 3})
    async with setting.bridge(dead_letters=limited) as bridge:
        with pytest.raises(PoisonLimitReached, match="poison_limit"):
            await bridge.run(until_empty=True)
    assert len(setting.waiting()) + len(await setting.dead_letters()) >= 9
    assert len(await setting.dead_letters()) <= 3


class FailingSink(KafkaSink):
    """A sink whose brokers take nothing as long as ``is_down`` is set; counts the attempts."""

    is_down = True
    attempts = 0

    async def publish_each(self, records: Sequence[OutgoingRecord]) -> list[Any]:
        self.attempts += 1
        if self.is_down:
            return [TransientError("the brokers are away") for _ in records]
        return await super().publish_each(records)


async def test_nothing_is_deleted_before_the_brokers_have_it(setting: Setting) -> None:
    setting.send(notification("a"), "poison")
    async with setting.bridge(FailingSink) as bridge:
        sink = bridge._sink
        assert isinstance(sink, FailingSink)
        running = asyncio.create_task(bridge.run(until_empty=True))
        await eventually(lambda: sink.attempts > 3)
        assert setting.counts() == (0, 2)
        sink.is_down = False
        await running
    assert (await setting.keys(), len(await setting.dead_letters())) == (["a"], 1)
    assert setting.counts() == (0, 0)


async def test_messages_stay_hidden_while_the_brokers_are_away(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_module, "BEATS", 1_000)
    setting.send(notification("a"))
    async with setting.bridge(FailingSink) as bridge:
        running = asyncio.create_task(bridge.run(until_empty=True))
        await eventually(lambda: setting.counts() == (0, 1))
        seen = {setting.hidden_until()}
        # Each heartbeat begins the timeout anew.
        await eventually(lambda: len(seen) > 3 or seen.add(setting.hidden_until()))
        bridge._sink.is_down = False  # type: ignore[attr-defined]
        await running
    assert await setting.keys() == ["a"]


async def test_a_stop_gives_back_what_the_brokers_do_not_take(setting: Setting) -> None:
    bodies = [notification("a"), notification("b")]
    setting.send(*bodies)
    soon = setting.settings.admission.model_copy(update={"drain_timeout_s": 0.1})
    async with setting.bridge(FailingSink, admission=soon) as bridge:
        running = asyncio.create_task(bridge.run())
        await eventually(lambda: bridge._sink.attempts)  # type: ignore[attr-defined]
        bridge.stop()
        await running
    assert sorted(setting.waiting()) == sorted(bodies)


async def test_a_stop_moves_what_is_held(setting: Setting) -> None:
    setting.send(*(notification(f"{number}") for number in range(5)))
    async with setting.bridge(FailingSink) as bridge:
        running = asyncio.create_task(bridge.run())
        await eventually(lambda: bridge._sink.attempts)  # type: ignore[attr-defined]
        bridge.stop()
        bridge._sink.is_down = False  # type: ignore[attr-defined]
        await running
    left = [event.key for body in setting.waiting() for event in parse_events(body.encode())]
    assert sorted(await setting.keys() + left) == [f"{number}" for number in range(5)]
    assert bridge.moved.messages > 0


async def test_an_outage_of_the_queue_is_waited_for(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    receive, delete, failures = SqsQueue.receive, SqsQueue.delete, {"receive": 3, "delete": 3}

    def failing(name: str, operation: Any) -> Any:
        async def call(self: SqsQueue, *arguments: Any) -> Any:
            failures[name] -= 1
            if failures[name] >= 0:
                raise (CredentialsRefused if name == "receive" else TransientError)("SQS is away")
            return await operation(self, *arguments)

        return call

    monkeypatch.setattr(SqsQueue, "receive", failing("receive", receive))
    monkeypatch.setattr(SqsQueue, "delete", failing("delete", delete))
    setting.send(notification("a"))
    async with setting.bridge() as bridge:
        running = asyncio.create_task(bridge.run())
        await eventually(lambda: bridge.moved.messages)
        bridge.stop()
        await running
    assert await setting.keys() == ["a"]


async def test_a_queue_that_is_not_there_ends_the_bridge(setting: Setting) -> None:
    setting.client.delete_queue(QueueUrl=setting.url)
    async with setting.bridge() as bridge:
        with pytest.raises(ConfigurationError, match="there is no queue"):
            await bridge.run()


@pytest.mark.kafka
@pytest.mark.parametrize("step", ["received", "publish", "delete"])
async def test_a_kill_in_mid_batch_loses_nothing(step: str, kafka_broker: str, s3: S3Part, tmp_path: Path) -> None:
    setting = await Setting.on(kafka_broker, s3.endpoint_url)
    names = [f"{number} +%.pdf" for number in range(25)]
    setting.send(*(notification(name) for name in names), "poison")
    arguments = ("--visibility", "2", "--receivers", "1")
    program = str(Path(__file__).with_name("bridge_program.py"))
    killed = setting.process(tmp_path, *arguments, program=(program, step))
    killed.start()
    await eventually(lambda: not killed.is_running)
    assert killed.exit_code == -signal.SIGKILL, killed.tail()
    assert sum(setting.counts()) > 0

    again = setting.process(tmp_path, *arguments)
    again.start()
    await eventually(lambda: setting.counts() == (0, 0), why="messages are left in the queue")
    assert again.stop() == 0, again.tail()
    assert set(await setting.keys()) == set(names)
    assert {letter.value for letter in await setting.dead_letters()} == {b"poison"}


async def test_sigterm_drains_the_process(setting: Setting, tmp_path: Path) -> None:
    names = [f"{number}.pdf" for number in range(200)]
    setting.send(*(notification(name) for name in names))
    # One: moto 5 rebuilds its list of messages at a deletion, so that one of two at once undoes the other.
    process = setting.process(tmp_path, "--receivers", "1")
    process.start()
    await eventually(lambda: setting.counts() != (len(names), 0) or not process.is_running)
    assert process.stop(grace_s=60) == 0, process.tail()
    visible, hidden = setting.counts()
    assert hidden == 0, "what was held was neither moved nor given back"
    moved = await setting.keys()
    left = [event.key for body in setting.waiting() for event in parse_events(body.encode())]
    assert len(left) == visible
    assert sorted(moved + left) == sorted(names)


def test_the_command_says_what_it_moved_and_what_is_wrong(
    embedded_broker: str, s3: S3Part, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = asyncio.run(Setting.on(embedded_broker, s3.endpoint_url))
    for name, value in setting.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sqs, "WAIT_S", 0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        setting.send(notification("a", "b"), TEST_EVENT, "poison")
        assert main(["bridge", "sqs", setting.url, "--exit-when-drained", "--json"]) == 0
        moved = {"messages": 3, "events": 2, "test_events": 1, "dead_letters": 1}
        assert json.loads(capsys.readouterr().out) == moved
        assert main(["dlq", "list", "--json"]) == 0
        (letter,) = json.loads(capsys.readouterr().out)
        assert (letter["code"], letter["stage"]) == ("invalid_event", "receive")
        assert main(["dlq", "show", letter["place"]]) == 0
        assert json.loads(capsys.readouterr().out)["queue"] == setting.url.rpartition("/")[2]
        assert main(["dlq", "replay", "--all", "--topic", setting.settings.topics.events, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["state"] == "replayed"
        assert b"poison" in [one.value for one in asyncio.run(setting.records(setting.settings.topics.events))]
        assert main(["bridge", "sqs", "receipts"]) == 2
        assert "named by its URL" in capsys.readouterr().err
        assert main(["bridge", "sqs", setting.url + "-other", "--exit-when-drained"]) == 2
        assert "there is no queue" in capsys.readouterr().err
        topic = unique_name("other")
        asyncio.run(create_topic(embedded_broker, topic))
        setting.send(notification("c"))
        assert main(["bridge", "sqs", setting.url, "--exit-when-drained", "--topic", topic]) == 0
        assert f"1 message: 1 event sent to {topic}, 0 test events, 0 dead letters" in capsys.readouterr().err
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("url", "region"),
    [
        ("https://sqs.eu-central-1.amazonaws.com/123456789012/receipts", "eu-central-1"),
        ("https://sqs.cn-north-1.amazonaws.com.cn/123456789012/receipts", "cn-north-1"),
        ("https://vpce-0a1b.sqs.eu-west-1.vpce.amazonaws.com/123456789012/receipts", "eu-west-1"),
        ("http://localhost:4566/000000000000/receipts", "us-east-1"),
    ],
)
def test_the_url_of_a_queue_names_its_region(url: str, region: str) -> None:
    queue = SqsQueue(url)
    assert queue._client.meta.region_name == region
    assert queue.name == "receipts"
    queue.close()
