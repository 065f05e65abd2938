"""One test's own topics, group and bucket, and the real worker process that works on them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from chaos.broker_logs import job_of
from parts import S3Part, create_topic, eventually, python_process, unique_name, worker_process

from nanovllm.client.producer import JobProducer
from nanovllm.client.results import ResultReader
from nanovllm.demo.child_process import LocalProcess
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.result import Result
from nanovllm.settings.kafka import KafkaSettings
from nanovllm.settings.topics import TopicSettings
from nanovllm.settings.worker import Settings

PARTITIONS = 4
TOPICS = ("jobs", "results", "metrics", "dead_letters", "in_flight", "events")


@dataclass
class World:
    """``results`` and ``dead_letters`` by job_id, as far as ``read`` has read them; a job may be answered twice.

    ``events`` is a topic of events that is there already; unset: one of its own, which is not created.
    """

    bootstrap_servers: str
    s3: S3Part
    directory: Path
    worker_settings: dict[str, str]
    bucket: str = ""
    events: str = ""
    topics: TopicSettings = field(init=False)
    group: str = field(default_factory=lambda: unique_name("group"))
    results: dict[str, list[Result]] = field(default_factory=lambda: defaultdict(list))
    dead_letters: dict[str, list[DeadLetter]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        base = unique_name("world")
        names = {name: f"{base}.{name}" for name in TOPICS}
        self.topics = TopicSettings(**(names | ({"events": self.events} if self.events else {})))
        self.bucket = self.bucket or self.s3.make_bucket()

    @property
    def kafka(self) -> KafkaSettings:
        return KafkaSettings(bootstrap_servers=self.bootstrap_servers)

    async def create_topics(self, replicas: int = 1) -> None:
        topics = self.topics
        names = (topics.jobs, topics.results, topics.metrics, topics.dead_letters)
        await create_topic(self.bootstrap_servers, *names, partitions=PARTITIONS, replicas=replicas)

    def producer(self) -> JobProducer:
        return JobProducer(self.kafka, topic=self.topics.jobs)

    def reader(self) -> ResultReader:
        return ResultReader(reader_settings(self), from_beginning=True, dead_letters=True)

    async def read(self, reader: ResultReader) -> None:
        for outcome in await reader.read():
            if isinstance(outcome, Result):
                self.results[outcome.job_id].append(outcome)
            else:
                self.dead_letters[outcome.job_id or ""].append(outcome)

    @property
    def environment(self) -> dict[str, str]:
        """Variables that name brokers, topics and the store, as for a worker."""
        return {
            "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": self.bootstrap_servers,
            "NANOVLLM_KAFKA__GROUP_ID": self.group,
            # As short as an Apache Kafka broker allows by default.
            "NANOVLLM_KAFKA__SESSION_TIMEOUT_MS": "6000",
            "NANOVLLM_KAFKA__HEARTBEAT_INTERVAL_MS": "1000",
            **{f"NANOVLLM_TOPICS__{name.upper()}": getattr(self.topics, name) for name in TOPICS},
            "NANOVLLM_S3__ENDPOINT_URL": self.s3.endpoint_url,
            "NANOVLLM_S3__ADDRESSING_STYLE": "path",
            "NANOVLLM_S3__ALLOW": f"s3://{self.bucket}/",
            "NANOVLLM_ADMISSION__IDLE_EXIT_S": "1",
            **self.s3.environment,
            **self.worker_settings,
        }

    def worker(self, name: str, *options: str, **process: Any) -> LocalProcess:
        return worker_process(self.directory, *options, settings=self.environment, name=name, **process)

    def process(self, name: str, *command: str) -> LocalProcess:
        """A program of Python's, such as ``-m nanovllm.cli.main dlq list``."""
        return python_process(self.directory, *command, settings=self.environment, name=name)

    async def drain(self, name: str) -> None:
        """Run a worker until nothing is left to do."""
        worker = self.worker(name, "--exit-when-drained")
        worker.start()
        try:
            await eventually(lambda: not worker.is_running, within_s=250, why=f"{name} goes on working")
        finally:
            worker.kill()
        assert worker.exit_code == 0, worker.tail(30)

    async def held_back(self) -> set[str]:
        """Jobs whose outcome lies behind the last stable offset of its partition.

        A worker's open transaction is aborted by the broker after ``kafka.transaction_timeout_ms``. What is unstable
        for longer than that is a transaction that the coordinator believes to have ended; see broker_logs. The next
        transaction of the same id that touches the partition makes it readable.
        """
        topics = (self.topics.results, self.topics.dead_letters)
        partitions = [TopicPartition(topic, number) for topic in topics for number in range(PARTITIONS)]
        stable, last = [await self._ends(partitions, level) for level in ("read_committed", "read_uncommitted")]
        unstable = [partition for partition in partitions if stable[partition] < last[partition]]
        found: set[str] = set()
        if not unstable:
            return found
        consumer = AIOKafkaConsumer(bootstrap_servers=self.bootstrap_servers, enable_auto_commit=False)
        consumer.assign(unstable)
        async with consumer:
            for partition in unstable:
                consumer.seek(partition, stable[partition])
            while batches := await consumer.getmany(timeout_ms=2_000):
                for record in (record for batch in batches.values() for record in batch):
                    found.add(job_of(record))
        return found

    async def _ends(self, partitions: list[TopicPartition], isolation_level: str) -> dict[TopicPartition, int]:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap_servers, isolation_level=isolation_level, enable_auto_commit=False
        )
        consumer.assign(partitions)
        async with consumer:
            ends: dict[TopicPartition, int] = await consumer.end_offsets(partitions)
            return ends

    async def lag(self, topic: str = "") -> int:
        """Records of ``topic``, or of the jobs' own, that the group has not committed."""
        partitions = [TopicPartition(topic or self.topics.jobs, number) for number in range(PARTITIONS)]
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap_servers, group_id=self.group, enable_auto_commit=False
        )
        consumer.assign(partitions)
        async with consumer:
            ends = await consumer.end_offsets(partitions)
            return sum([ends[partition] - (await consumer.committed(partition) or 0) for partition in partitions])


def reader_settings(world: World) -> Settings:
    """Brokers and topics of ``world``, without a look at the environment."""
    return Settings.model_construct(kafka=world.kafka, topics=world.topics)
