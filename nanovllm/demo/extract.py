"""The documents part of a run: PDFs are stored, their events published, their records collected."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from datetime import UTC, datetime

from prometheus_client.parser import text_string_to_metric_families

from nanovllm.client.connection import connected_producer
from nanovllm.client.reconcile import created_event
from nanovllm.client.results import ResultReader, client_settings
from nanovllm.demo.child_process import HOST, LocalProcess, read_loopback
from nanovllm.demo.document_outcome import DocumentOutcome
from nanovllm.demo.documents import DemoDocument, DemoDocuments
from nanovllm.demo.jobs import BUCKET
from nanovllm.demo.object_store import EmbeddedObjectStore
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.objects.listing import ListedObject
from nanovllm.settings.kafka import KafkaSettings
from nanovllm.settings.topics import TopicSettings

WAIT_S = 60.0
"""Without an end of an event for so long, the rest is given up."""


class DocumentsAtWork:
    """Stores documents, publishes their events one after another, and waits for the end of each.

    A worker runs its events concurrently: one after another they show which page was there before.
    """

    def __init__(
        self, store: EmbeddedObjectStore, kafka: KafkaSettings, topics: TopicSettings, worker: LocalProcess, port: int
    ) -> None:
        """``port``: where the worker serves its metrics on loopback."""
        self._store = store
        self._kafka = kafka
        self._topics = topics
        self._worker = worker
        self._metrics_url = f"http://{HOST}:{port}/metrics"

    async def __call__(self, documents: DemoDocuments) -> DocumentOutcome:
        """What came of ``documents``: those whose events have not ended in time have no record."""
        tags = await asyncio.to_thread(self._put, documents)
        began = time.monotonic()
        settings = client_settings(self._kafka, self._topics)
        async with connected_producer(self._kafka) as producer, ResultReader(settings, documents=True) as reader:
            for number, document in enumerate(documents.events, 1):
                listed = ListedObject(document.uri, tags[document.key], len(document.data), datetime.now(UTC))
                event = created_event(self._topics.events, listed)
                await producer.send_and_wait(event.topic, event.value, key=event.key, headers=list(event.headers))
                if not await self._has_ended(number):
                    break
            seconds, ended = time.monotonic() - began, await self._ended()
            records = await self._records(reader, ended["result"])
        sidecars = {one.key: await asyncio.to_thread(self._sidecar, one) for one in documents.documents}
        return DocumentOutcome(documents, records, sidecars, ended, seconds)

    def _put(self, documents: DemoDocuments) -> dict[str, str]:
        return {one.key: self._store.put(BUCKET, one.key, one.data) for one in documents.documents}

    def _sidecar(self, document: DemoDocument) -> DocumentRecord | None:
        content = self._store.get(BUCKET, document.sidecar_key)
        return None if content is None else DocumentRecord.model_validate_json(content)

    async def _records(self, reader: ResultReader, count: int) -> dict[str, DocumentRecord]:
        """The records by URI: ``count`` of them, or as many as come in time."""
        deadline, records = time.monotonic() + WAIT_S, dict[str, DocumentRecord]()
        while len(records) < count and time.monotonic() < deadline:
            found = [one for one in await reader.read() if isinstance(one, DocumentRecord)]
            records |= {record.document.uri: record for record in found}
        return records

    async def _has_ended(self, count: int) -> bool:
        deadline = time.monotonic() + WAIT_S
        while self._worker.is_running and time.monotonic() < deadline:
            if (await self._ended()).total() >= count:
                return True
            await asyncio.sleep(0.05)
        return False

    async def _ended(self) -> Counter[str]:
        """The worker's events by what came of them, as its metrics count them."""
        try:
            page = (await asyncio.to_thread(read_loopback, self._metrics_url)).decode()
        except OSError:
            return Counter()
        samples = [one for family in text_string_to_metric_families(page) for one in family.samples]
        return Counter(
            {one.labels["outcome"]: int(one.value) for one in samples if one.name == "nanovllm_events_total"}
        )
