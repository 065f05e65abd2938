"""A worker of this process with real parts around it: broker, S3 server, decoder processes, an engine that echoes."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from parts import S3Part, create_topic
from PIL import Image

from nanovllm.client.results import ResultReader
from nanovllm.engine.backends.base import EngineBackend, Generation, Request
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import NanoVLLMError
from nanovllm.kafka.client import producer_kwargs
from nanovllm.kafka.paced_metadata import pace_metadata
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.metrics import Metrics
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.pipeline.build import Parts, build_source, build_worker
from nanovllm.pipeline.build_documents import worker_routes
from nanovllm.pipeline.consuming.assignments import Assignments
from nanovllm.pipeline.consuming.ledger import PartitionLedger
from nanovllm.pipeline.consuming.source import JobSource
from nanovllm.pipeline.consuming.start_offset import StartOffsets
from nanovllm.pipeline.consuming.topic_watch import TopicWatch
from nanovllm.pipeline.failure.backoff import Backoff
from nanovllm.pipeline.failure.bucket_holds import BucketHolds, WatchedFetcher
from nanovllm.pipeline.operations.health import Health
from nanovllm.pipeline.worker import Worker
from nanovllm.settings.kafka import KafkaSettings
from nanovllm.settings.worker import Settings
from nanovllm.sinks.kafka import KafkaSink
from nanovllm.vision.images.decode import ImageLimits
from nanovllm.vision.images.pool import DecoderPool

PARTITIONS = 2


def source_of(
    kafka: KafkaSettings,
    topic: str,
    *,
    drain: Callable[[], Awaitable[None]],
    lost: Callable[[PartitionLedger], None],
    metrics: Metrics | None = None,
    max_out_of_order: int = 1_000,
    delays_s: Mapping[str, int] | None = None,
    exactly_once: bool = False,
) -> JobSource:
    """A source of one topic without a worker."""
    metrics = metrics or Metrics()
    start_offsets = StartOffsets(kafka.auto_offset_reset, metrics, read_in_full=delays_s or {})
    assignments = Assignments(
        kafka,
        start_offsets,
        max_out_of_order=max_out_of_order,
        lost=lost,
        exactly_once=exactly_once,
        crash_guard=None,
    )
    return JobSource(
        kafka,
        {topic: 0},
        assignments,
        drain=drain,
        drain_timeout_s=0.0,
        delays_s=delays_s or {},
        watch=TopicWatch([topic], [], metrics),
    )


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class Bench:
    """Topics of one test, and what a worker needs to work on them."""

    bootstrap_servers: str
    settings: Settings
    producer: AIOKafkaProducer
    decoders: DecoderPool
    metrics: Metrics = field(default_factory=Metrics)
    health: Health = field(default_factory=Health)
    polls: int = 0
    source: JobSource | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Variables that give the command line the bench's topics and brokers."""
        topics = self.settings.topics.model_dump().items()
        names = {f"NANOVLLM_TOPICS__{name.upper()}": topic for name, topic in topics if isinstance(topic, str)}
        return names | {"NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": self.bootstrap_servers}

    async def send(self, *jobs: Mapping[str, Any] | bytes, partition: int = 0, **record: Any) -> None:
        """``record``: key, headers and whatever else the producer takes."""
        for job in jobs:
            value = job if isinstance(job, bytes) else json.dumps(job).encode()
            await self.producer.send_and_wait(self.settings.topics.jobs, value, partition=partition, **record)

    @asynccontextmanager
    async def working(
        self, engine: EngineBackend, /, fetcher: Any = None, sink: KafkaSink | None = None, **settings: Any
    ) -> AsyncIterator[tuple[Worker, asyncio.Task[None]]]:
        """A worker at work inside, stopped and awaited at the end."""
        self.health = Health()
        effective = self.settings.model_copy(update=settings)
        fetcher = fetcher or ObjectFetcher(
            effective.s3, max_bytes=effective.images.max_bytes, http=effective.http_images
        )
        sink = sink or KafkaSink(self.producer)
        worker = build_worker(
            effective,
            Parts(engine, self.decoders, fetcher),
            sink,
            self.metrics,
            self.health,
            routes=worker_routes(effective),
            backoff=Backoff(base_s=0.01, cap_s=0.05),
        )
        source = build_source(worker, sink.limits)
        self.source = source
        poll = source.poll

        async def counted(*arguments: Any, **options: Any) -> Any:
            self.polls += 1
            return await poll(*arguments, **options)

        source.poll = counted  # type: ignore[method-assign]
        await source.start()
        running = asyncio.create_task(worker.run(source))
        try:
            yield worker, running
            if not running.done():
                worker.stop()
                await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def polled(self, times: int = 5) -> None:
        """Return when the worker has polled so often again: what it was to take until then, it has taken."""
        begun = self.polls
        await eventually(lambda: self.polls >= begun + times)

    async def read(self, topic: str, count: int, timeout_s: float = 60) -> list[Any]:
        """The first ``count`` records of a topic; fails when fewer come in time."""
        consumer = AIOKafkaConsumer(
            topic,
            bootstrap_servers=self.bootstrap_servers,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            isolation_level="read_committed",
        )
        await consumer.start()
        records: list[Any] = []
        try:
            async with asyncio.timeout(timeout_s):
                while len(records) < count:
                    for batch in (await consumer.getmany(timeout_ms=200)).values():
                        records += batch
        finally:
            await consumer.stop()
        return records

    async def results(self, count: int) -> dict[str, dict[str, Any]]:
        records = await self.read(self.settings.topics.results, count)
        return {record.key.decode(): json.loads(record.value) for record in records}

    async def dead_letters(self, count: int) -> list[tuple[dict[str, str], bytes]]:
        records = await self.read(self.settings.topics.dead_letters, count)
        return [({name: value.decode() for name, value in record.headers}, record.value) for record in records]

    async def committed(self, partition: int = 0, topic: str | None = None) -> int | None:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap_servers,
            group_id=self.settings.kafka.group_id,
            enable_auto_commit=False,
        )
        await consumer.start()
        try:
            return await consumer.committed(TopicPartition(topic or self.settings.topics.jobs, partition))
        finally:
            await consumer.stop()

    async def ends(self, partition: int = 0) -> int:
        consumer = AIOKafkaConsumer(bootstrap_servers=self.bootstrap_servers)
        await consumer.start()
        try:
            tp = TopicPartition(self.settings.topics.jobs, partition)
            return (await consumer.end_offsets([tp]))[tp]
        finally:
            await consumer.stop()


async def answered(bench: Bench, job_ids: set[str]) -> None:
    """Return when each of ``job_ids`` has a result."""
    missing = set(job_ids)
    async with ResultReader(bench.settings, from_beginning=True) as reader, asyncio.timeout(60):
        while missing:
            missing -= {result.job_id for result in await reader.read()}


async def eventually(holds: Callable[[], Awaitable[bool]] | Callable[[], bool], timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            answer = holds()
            if await answer if isinstance(answer, Awaitable) else answer:
                return
            await asyncio.sleep(0.05)


async def reached(bench: Bench, offset: int, partition: int = 0) -> bool:
    return await bench.committed(partition) == offset


class FaultySink(KafkaSink):
    """Runs ``before`` with the records of each publication, which may note them, wait or raise."""

    def __init__(
        self, producer: AIOKafkaProducer, before: Callable[[Sequence[OutgoingRecord]], Awaitable[None]]
    ) -> None:
        super().__init__(producer)
        self._before = before

    async def publish_each(self, records: Sequence[OutgoingRecord]) -> list[NanoVLLMError | None]:
        await self._before(records)
        return await super().publish_each(records)


def watched(fetcher: ObjectFetcher) -> WatchedFetcher:
    """``fetcher`` as the image cache of a worker has it."""
    return WatchedFetcher(fetcher, BucketHolds(lambda *_: None))


class FaultyFetcher(ObjectFetcher):
    """Fails in ways that a healthy store cannot be brought to, until ``heal``."""

    def __init__(self, settings: Settings, error: Exception, *, failures: int | None = None) -> None:
        super().__init__(settings.s3, max_bytes=100_000)
        self.error: Exception | None = error
        self.left = failures
        self.attempts = 0

    def heal(self) -> None:
        self.error = None

    async def fetch(self, ref: Any, **held: Any) -> Any:
        self.attempts += 1
        if self.error is None or self.left == 0:
            return await super().fetch(ref, **held)
        if self.left is not None:
            self.left -= 1
        raise self.error


class GatedEngine(EchoEngine):
    """Answers a job only after its gate was opened, by its id."""

    def __init__(self, **engine: Any) -> None:
        super().__init__(**engine)
        self.requests: list[Request] = []
        self._gates: dict[str, asyncio.Event] = {}

    def open(self, *job_ids: str) -> None:
        for job_id in job_ids:
            self._gate(job_id).set()

    async def submitted(self, *job_ids: str) -> None:
        await eventually(lambda: set(job_ids) <= {job_id_of(request) for request in self.requests})

    def submit(self, request: Request) -> Generation:
        self.requests.append(request)
        return super().submit(request)

    def _begin(self, request: Request, generation: Generation) -> None:
        self._begun[request.request_id] = asyncio.create_task(self._answer_later(request, generation))

    async def _answer_later(self, request: Request, generation: Generation) -> None:
        await self._gate(job_id_of(request)).wait()
        await super()._answer_later(request, generation)

    def _gate(self, job_id: str) -> asyncio.Event:
        return self._gates.setdefault(job_id, asyncio.Event())


def job_id_of(request: Request) -> str:
    return request.request_id.rpartition("#")[0]


@asynccontextmanager
async def bench_on(broker: str, unique: Callable[[str], str], s3: S3Part) -> AsyncIterator[Bench]:
    topics = {name: unique(name) for name in ("jobs", "results", "metrics", "dead_letters")}
    await create_topic(broker, *topics.values(), partitions=PARTITIONS)
    settings = Settings.model_validate(
        {
            "kafka": {"bootstrap_servers": broker, "group_id": unique("group")},
            "topics": topics | {"replayed": unique("replayed")},  # made by the first replay
            "s3": {"endpoint_url": s3.endpoint_url, "addressing_style": "path", "allow": ("s3://images",)},
            "images": {"max_bytes": 100_000},
            "admission": {"drain_timeout_s": 20, "idle_exit_s": 0.5, "max_jobs": 16},
        }
    )
    producer = AIOKafkaProducer(**producer_kwargs(settings.kafka))
    pace_metadata(producer.client)
    await producer.start()
    echo = EchoEngine()
    assert echo.image_transform is not None
    decoders = DecoderPool(echo.image_transform, ImageLimits(max_bytes=100_000), workers=1)
    await decoders.start()
    yield Bench(broker, settings, producer, decoders)
    await decoders.close()
    await producer.stop()
