"""A topic whose limit is below what the producer would put into one batch, from the start or later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from bench import Bench
from parts import REPOSITORY, create_topic
from world import World

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import BrokersUnavailable
from nanovllm.kafka.admin import message_limits
from nanovllm.kafka.topic_limits import READ_INTERVAL_S, TopicLimits
from nanovllm.messages.job import Job
from nanovllm.pipeline.build import build_producer, written_topics
from nanovllm.settings.worker import Settings
from nanovllm.sinks.kafka import KafkaSink

JOBS = 400


@pytest.mark.kafka
async def test_small_results_are_not_refused_together_for_their_batch_is_too_large(kafka_broker, s3, tmp_path):
    world = World(kafka_broker, s3, tmp_path, {"NANOVLLM_ENGINE__BACKEND": "echo"})
    topics = world.topics
    await create_topic(kafka_broker, topics.jobs, topics.metrics, topics.dead_letters)
    await create_topic(kafka_broker, topics.results, partitions=1, settings={"max.message.bytes": "4000"})
    async with world.producer() as producer, world.reader() as reader:
        await asyncio.gather(*(producer.send_job(Job(job_id=f"j-{n}", prompt="Say so")) for n in range(JOBS)))
        worker = world.worker("w")
        worker.start()
        try:
            async with asyncio.timeout(100):
                while len(world.results) + len(world.dead_letters) < JOBS:
                    await world.read(reader)
        finally:
            worker.kill()
    assert not world.dead_letters
    assert len(world.results) == JOBS


async def set_limit(broker: str, topic: str, max_bytes: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=broker)
    await admin.start()
    try:
        limit = {"max.message.bytes": str(max_bytes)}
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, topic, limit)])
    finally:
        await admin.close()


@pytest.mark.kafka
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_a_limit_that_is_lowered_while_the_worker_runs_refuses_only_what_is_too_large(
    kafka_broker, s3, tmp_path, delivery: str
):
    world = World(kafka_broker, s3, tmp_path, {"NANOVLLM_ENGINE__BACKEND": "echo", "NANOVLLM_DELIVERY": delivery})
    topics = world.topics
    await create_topic(kafka_broker, topics.jobs, topics.metrics, topics.dead_letters)
    await create_topic(kafka_broker, topics.results, partitions=1)
    worker = world.worker("w")
    async with world.producer() as producer, world.reader() as reader:

        async def outcomes(count: int) -> None:
            async with asyncio.timeout(100):
                while len(world.results) + len(world.dead_letters) < count:
                    await world.read(reader)

        worker.start()
        try:
            await producer.send_job(Job(job_id="before", prompt="Say so"))
            await outcomes(1)
            await set_limit(kafka_broker, topics.results, 3_000)
            await asyncio.gather(
                *(producer.send_job(Job(job_id=f"j-{n}", prompt="Say so")) for n in range(JOBS)),
                producer.send_job(Job(job_id="large", prompt="x" * 6_000)),
            )
            await outcomes(JOBS + 2)
        finally:
            worker.kill()
    assert set(world.dead_letters) == {"large"}
    assert len(world.results) == JOBS + 1


@pytest.mark.kafka
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
@pytest.mark.parametrize("lowered", ["results", "metrics"])
async def test_the_first_record_after_a_limit_was_lowered_is_refused_alone_and_the_worker_goes_on(
    kafka_broker, s3, tmp_path, delivery: str, lowered: str
):
    world = World(kafka_broker, s3, tmp_path, {"NANOVLLM_ENGINE__BACKEND": "echo", "NANOVLLM_DELIVERY": delivery})
    topics = world.topics
    await create_topic(kafka_broker, topics.jobs, topics.results, topics.metrics, topics.dead_letters)
    worker = world.worker("w")
    async with world.producer() as producer, world.reader() as reader:
        worker.start()
        try:
            await producer.send_job(Job(job_id="before", prompt="Say so"))
            async with asyncio.timeout(100):
                while not world.results:
                    await world.read(reader)
            await set_limit(kafka_broker, getattr(topics, lowered), 600)
            await producer.send_job(Job(job_id="large", prompt="x" * 2_000))
            async with asyncio.timeout(100):
                while not world.dead_letters:
                    await world.read(reader)
            await set_limit(kafka_broker, getattr(topics, lowered), 1 << 20)
            await producer.send_job(Job(job_id="behind", prompt="Say so"))
            assert worker.is_running
        finally:
            worker.kill()
    assert {job: letters[0].code for job, letters in world.dead_letters.items()} == {"large": "message_too_large"}


@pytest.mark.kafka
async def test_a_topic_that_is_too_small_for_dead_letters_is_named_at_start(kafka_broker, s3, tmp_path):
    world = World(kafka_broker, s3, tmp_path, {"NANOVLLM_ENGINE__BACKEND": "echo"})
    topics = world.topics
    await create_topic(kafka_broker, topics.jobs, topics.results, topics.metrics)
    await create_topic(kafka_broker, topics.dead_letters, settings={"max.message.bytes": "900"})
    async with world.producer() as producer:
        await producer.send_job(Job(job_id="j", prompt="Say so"))
    await world.drain("w")
    log = world.worker("w").log.read_text()
    assert f"topic {topics.dead_letters} takes 900 bytes" in log
    assert "max.message.bytes" in log


@asynccontextmanager
async def sink_of(settings: Settings) -> AsyncIterator[KafkaSink]:
    """A sink as a worker has it, with the limits of its topics as they are now."""
    read = partial(message_limits, settings.kafka, written_topics(settings, None))
    limits = TopicLimits(await read(), read=read)
    producer = build_producer(settings, limits)
    await producer.start()
    try:
        yield KafkaSink(producer, limits)
    finally:
        await producer.stop()


@pytest.mark.kafka
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_a_limit_that_is_raised_is_noticed_by_the_next_record_that_is_above_it(
    kafka_bench: Bench, monkeypatch: pytest.MonkeyPatch, delivery: str
) -> None:
    monkeypatch.setattr("nanovllm.kafka.topic_limits.READ_INTERVAL_S", 0.0)
    bench, topics = kafka_bench, kafka_bench.settings.topics
    changes = {"delivery": delivery}
    broken = b"{" + b"x" * 20_000
    for topic, limit in ((topics.results, 1_500), (topics.dead_letters, 9_000)):
        await set_limit(bench.bootstrap_servers, topic, limit)
    async with sink_of(bench.settings) as sink, bench.working(EchoEngine(), sink=sink, **changes):
        await bench.send({"job_id": "before", "prompt": "x" * 6_000}, broken)
        letters = await bench.dead_letters(2)
        assert {letter["nanovllm_code"] for letter, _ in letters} == {"message_too_large", "invalid_job"}
        assert max(len(value) for _, value in letters) < 9_000
        for topic in (topics.results, topics.dead_letters):
            await set_limit(bench.bootstrap_servers, topic, 1 << 20)
        await bench.send({"job_id": "after", "prompt": "x" * 6_000}, broken)
        assert set(await bench.results(1)) == {"after"}
        assert [value for _, value in await bench.dead_letters(3)].count(broken) == 1


@pytest.mark.kafka
async def test_a_transaction_that_is_refused_for_its_size_names_its_topics_and_their_limits(
    kafka_bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench, topics = kafka_bench, kafka_bench.settings.topics
    async with sink_of(bench.settings) as sink, bench.working(EchoEngine(), sink=sink, delivery="exactly_once"):
        await bench.send({"job_id": "before", "prompt": "p"})
        await bench.results(1)
        await set_limit(bench.bootstrap_servers, topics.results, 3_000)
        await bench.send({"job_id": "large", "prompt": "x" * 6_000})
        ((letter, _),) = await bench.dead_letters(1)
    assert letter["nanovllm_code"] == "message_too_large"
    for text in (letter["nanovllm_message"], caplog.text):
        assert f"{topics.results} (" in text
        assert "limit 3000)" in text
        assert f"{topics.metrics} (" in text


async def test_many_records_above_a_limit_read_it_once_in_the_time_that_the_docs_say() -> None:
    reads = []

    async def read() -> dict[str, int]:
        reads.append(1)
        await asyncio.sleep(0)
        return {"results": 2_000}

    limits = TopicLimits({"results": 1_500}, read=read)
    assert await limits.room_for("results", 1_500) == 1_500
    assert not reads
    assert set(await asyncio.gather(*(limits.room_for("results", 3_000) for _ in range(200)))) == {2_000}
    assert len(reads) == 1
    assert limits.batch_bytes == 2_000
    assert f"at most once in {READ_INTERVAL_S:g} s" in (REPOSITORY / "docs" / "retries.md").read_text()


async def test_limits_of_earlier_stay_while_the_brokers_do_not_answer() -> None:
    async def read() -> dict[str, int]:
        raise BrokersUnavailable("away")

    assert await TopicLimits({"results": 1_500}, read=read).room_for("results", 3_000) == 1_500
    assert await TopicLimits({"results": 1_500}).room_for("results", 3_000) == 1_500
