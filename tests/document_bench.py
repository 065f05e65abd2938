"""A worker of this process with the shipped model, a topic of events and a bucket, for tests of documents."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_plus

import yaml
from bench import Bench, eventually
from parts import S3Part

from nanovllm.messages.document_record import DocumentRecord
from nanovllm.pipeline import build
from nanovllm.pipeline.worker import Worker
from nanovllm.settings.documents import DocumentSettings
from nanovllm.settings.engine import EngineSettings

if TYPE_CHECKING:
    from nanovllm.pipeline.operations.tracing import Tracing


def event(
    bucket: str,
    key: str,
    *,
    etag: str | None = None,
    version_id: str | None = None,
    sequencer: str | None = None,
    name: str = "ObjectCreated:Put",
    time: datetime | None = None,
) -> dict[str, Any]:
    """A record of AWS."""
    subject = {"key": quote_plus(key, safe="/"), "eTag": etag, "versionId": version_id, "sequencer": sequencer}
    return {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "eventTime": (time or datetime.now(UTC)).isoformat(),
        "eventName": name,
        "s3": {"bucket": {"name": bucket}, "object": {name: value for name, value in subject.items() if value}},
    }


@dataclass
class Documents:
    """A bench with a topic of events, a bucket, and the shipped model."""

    bench: Bench
    s3: S3Part
    bucket: str
    events: str
    folder: Path

    def settings(self, *routes: Mapping[str, Any], page_store: bool = False, **more: Any) -> dict[str, Any]:
        file = self.folder / "routes.yaml"
        store = {"page_store": f"s3://{self.bucket}/kept"} if page_store else {}
        file.write_text(
            yaml.safe_dump({"version": 1, **store, "routes": [dict(route) for route in routes]}, sort_keys=False)
        )
        topics = self.bench.settings.topics.model_copy(update={"events": self.events})
        return {
            "documents": DocumentSettings(routes=file),
            "engine": EngineSettings(max_num_seqs=8),
            "topics": topics,
            "s3": self.bench.settings.s3.model_copy(update={"allow": ()}),
        } | more

    def put(self, key: str, body: bytes) -> dict[str, Any]:
        """Store an object; its event."""
        answer = self.s3.client.put_object(Bucket=self.bucket, Key=key, Body=body)
        return event(self.bucket, key, etag=answer["ETag"].strip('"'), version_id=answer.get("VersionId"))

    async def send(self, *messages: Any, partition: int = 0) -> None:
        for message in messages:
            value = message if isinstance(message, bytes) else json.dumps(message).encode()
            await self.bench.producer.send_and_wait(self.events, value, partition=partition)

    def counted(self) -> Counter[str]:
        """Events by what came of them."""
        samples = [one for metric in self.bench.metrics.events.collect() for one in metric.samples]
        return Counter({one.labels["outcome"]: int(one.value) for one in samples if one.name.endswith("_total")})

    async def ended(self, count: int) -> None:
        await eventually(lambda: self.counted().total() >= count, timeout_s=120)

    async def records(self, count: int, topic: str | None = None) -> list[DocumentRecord]:
        found = await self.bench.read(topic or self.bench.settings.topics.results, count)
        return [DocumentRecord.model_validate_json(one.value) for one in found]

    @asynccontextmanager
    async def working(
        self, traces: Tracing | None = None, **settings: Any
    ) -> AsyncIterator[tuple[Worker, asyncio.Task[None]]]:
        effective = self.bench.settings.model_copy(update=settings)
        engine = await build.load_engine(effective)
        await engine.start()
        decoders = build.build_decoders(effective, engine)
        assert decoders is not None
        await decoders.start()
        bench = replace(self.bench, decoders=decoders)
        try:
            async with bench.working(engine, traces=traces, **settings) as at_work:
                yield at_work
        finally:
            await decoders.close()
            await engine.close()
