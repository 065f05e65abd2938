"""kill -9 in the middle of the work: nothing is lost, and what is answered twice is the same answer."""

from __future__ import annotations

import asyncio
import io
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from parts import S3Part, create_topic, eventually, unique_name, worker_process
from PIL import Image

from nanovllm.pipeline.broker import evict_members
from nanovllm.pipeline.job import Job
from nanovllm.pipeline.local_process import LocalProcess
from nanovllm.pipeline.producer import JobProducer
from nanovllm.pipeline.results import ResultReader
from nanovllm.pipeline.settings import KafkaSettings, Settings, TopicSettings
from nanovllm.sinks.messages import Result

JOBS = 300
KILL_AFTER = 60
READ_S = 30.0  # what is in the topic comes at once; this long only when something is missing
TINY_MODEL = Path(__file__).resolve().parents[2] / "nanovllm" / "engine" / "assets" / "tiny-receipts"


@dataclass
class World:
    """Topics, a bucket and a group of this test's own, and what the worker needs to know of them."""

    bootstrap_servers: str
    s3: S3Part
    directory: Path
    worker_settings: dict[str, str]
    topics: TopicSettings = field(init=False)
    group: str = field(default_factory=lambda: unique_name("group"))
    results: dict[str, list[Result]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        base = unique_name("kill")
        names = {name: f"{base}.{name}" for name in ("jobs", "results", "metrics", "dead_letters", "in_flight")}
        self.topics = TopicSettings(**names)

    @property
    def kafka(self) -> KafkaSettings:
        return KafkaSettings(bootstrap_servers=self.bootstrap_servers)

    def worker(self, name: str, *options: str) -> LocalProcess:
        settings = {
            "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": self.bootstrap_servers,
            "NANOVLLM_KAFKA__GROUP_ID": self.group,
            # As short as an Apache Kafka broker allows by default.
            "NANOVLLM_KAFKA__SESSION_TIMEOUT_MS": "6000",
            "NANOVLLM_KAFKA__HEARTBEAT_INTERVAL_MS": "1000",
            **{f"NANOVLLM_TOPICS__{key.upper()}": getattr(self.topics, key) for key in ("jobs", "results", "metrics")},
            "NANOVLLM_TOPICS__DEAD_LETTERS": self.topics.dead_letters,
            "NANOVLLM_S3__ENDPOINT_URL": self.s3.endpoint_url,
            "NANOVLLM_S3__ADDRESSING_STYLE": "path",
            # A narrow window: the kill falls into the work and not behind it.
            "NANOVLLM_ADMISSION__MAX_JOBS": "8",
            "NANOVLLM_ADMISSION__IDLE_EXIT_S": "1",
            **self.s3.environment,
            **self.worker_settings,
        }
        return worker_process(self.directory, *options, settings=settings, name=name)

    async def produce(self, prompt: str, images: list[bytes]) -> set[str]:
        """300 jobs about these images in turn; returns their ids."""
        bucket = self.s3.make_bucket()
        self.worker_settings["NANOVLLM_S3__ALLOW"] = f"s3://{bucket}/"
        uris = [self.s3.put(bucket, f"{number}.png", data) for number, data in enumerate(images)]
        jobs = [
            Job(job_id=f"job-{number:03d}", prompt=prompt, images=(uris[number % len(uris)],)) for number in range(JOBS)
        ]
        async with JobProducer(self.kafka, topic=self.topics.jobs) as producer:
            await asyncio.gather(*(producer.send_job(job) for job in jobs))
        return {str(job.job_id) for job in jobs}

    async def read(self, reader: ResultReader) -> None:
        for answer in await reader.read():
            assert isinstance(answer, Result), f"a dead letter: {answer}"
            self.results[answer.job_id].append(answer)

    async def lag(self) -> int:
        """Jobs that the group has not committed."""
        partitions = [TopicPartition(self.topics.jobs, number) for number in range(4)]
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap_servers, group_id=self.group, enable_auto_commit=False
        )
        consumer.assign(partitions)
        async with consumer:
            ends = await consumer.end_offsets(partitions)
            return sum([ends[partition] - (await consumer.committed(partition) or 0) for partition in partitions])


async def survives_a_kill(
    world: World, prompt: str, images: list[bytes], bury: Callable[[World], Awaitable[object]]
) -> None:
    topics = world.topics
    await create_topic(world.bootstrap_servers, topics.jobs, topics.results, topics.metrics, topics.dead_letters)
    jobs = await world.produce(prompt, images)
    settings = Settings.model_construct(kafka=world.kafka, topics=topics)
    async with ResultReader(settings, from_beginning=True, dead_letters=True) as reader:
        first = world.worker("first")
        first.start()
        try:
            while len(world.results) < KILL_AFTER:
                assert first.is_running, first.tail(30)
                await world.read(reader)
        finally:
            first.kill()
        await world.read(reader)
        assert len(world.results) < JOBS, "the kill came too late to be one in the middle"
        assert await world.lag() > 0

        await bury(world)
        second = world.worker("second", "--exit-when-drained")
        second.start()
        try:
            await eventually(lambda: not second.is_running, within_s=200, why=second.tail(30))
        finally:
            second.kill()
        assert second.exit_code == 0, second.tail(30)
        deadline = time.monotonic() + READ_S
        while jobs - world.results.keys():
            await world.read(reader)
            assert time.monotonic() < deadline, f"no result for {sorted(jobs - world.results.keys())}"
    assert world.results.keys() == jobs
    for answers in world.results.values():
        assert len({(answer.result_id, answer.text) for answer in answers}) == 1
    assert await world.lag() == 0


async def nothing(world: World) -> None:
    """A real broker's session timeout does it."""


async def evict(world: World) -> None:
    """The embedded broker never notices that a member died."""
    assert len(await evict_members(world.bootstrap_servers, world.group)) == 1


def coloured_images(count: int) -> list[bytes]:
    images = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (64, 48), (number, 255 - number, 40)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    return images


@pytest.mark.kafka
async def test_no_job_is_lost_when_the_worker_is_killed_on_apache_kafka(kafka_broker, s3, tmp_path):
    world = World(kafka_broker, s3, tmp_path, {"NANOVLLM_ENGINE__BACKEND": "echo"})
    await survives_a_kill(world, "Say <|image|>", coloured_images(60), nothing)


async def test_no_job_is_lost_when_the_worker_is_killed_on_the_embedded_broker(embedded_broker, s3, tmp_path):
    world = World(embedded_broker, s3, tmp_path, {"NANOVLLM_ENGINE__BACKEND": "echo"})
    await survives_a_kill(world, "Say <|image|>", coloured_images(60), evict)


@pytest.mark.skipif(not (TINY_MODEL / "config.json").exists(), reason="the tiny checkpoint is not in this tree")
async def test_no_job_is_lost_when_the_worker_is_killed_with_the_model_at_work(embedded_broker, s3, tmp_path):
    world = World(embedded_broker, s3, tmp_path, {"NANOVLLM_SAMPLING__MAX_TOKENS": "8"})
    await survives_a_kill(world, "What is the total? <|image|>", coloured_images(60), evict)
