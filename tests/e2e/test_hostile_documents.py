"""A worker process, broken and hostile documents, and those of the robustness corpus.

Each event ends with a record or a dead letter whose code says what the document is; memory stays bounded.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import subprocess
import urllib.request
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import pytest
import yaml
from bench import Bench, bench_on
from document_bench import event
from parts import S3Part, create_topic, eventually, png, unique_name, worker_process
from pdf_files import PROSE, encrypted, image_bomb_pdf, image_pdf, many_pages_pdf, scan, text_pdf

from nanovllm.demo.child_process import LocalProcess, free_port
from tools.document_corpus import documents as documents_of
from tools.document_corpus import fetch

MIB = 1 << 20
MAX_BYTES = 16 * MIB
DECODER_BYTES = 1 << 30
WORKER_GROWTH = 200 * MIB
CLEAN = text_pdf(PROSE)
SCANNED = image_pdf(scan())

ROUTE = {
    "prompt": "Read the page: <|image|>",
    "text": "only_if_clean",
    "pages": {"dpi": 72},
    "sampling": {"temperature": 0, "max_tokens": 8},
    "max_failed_pages": 0,
}


@dataclass
class Ends:
    """How the documents ended, by key: records, and codes of dead letters; ``worker_growth`` in bytes."""

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    worker_growth: int = 0


@dataclass
class Process:
    """A worker process with routes, and the memory of it and of its decoder processes."""

    bench: Bench
    s3: S3Part
    bucket: str
    events: str
    process: LocalProcess
    port: int
    decoder_peak: int = 0

    def put(self, key: str, body: bytes) -> dict[str, Any]:
        """Store an object; its event."""
        answer = self.s3.client.put_object(Bucket=self.bucket, Key=key, Body=body)
        return event(self.bucket, key, etag=answer["ETag"].strip('"'))

    async def ends(self, messages: list[dict[str, Any]], known: int = 0) -> Ends:
        """How all of ``messages`` end, behind ``known`` other records."""
        before = _status(self.process.pid, "VmRSS")
        for message in messages:
            await self.bench.producer.send_and_wait(self.events, json.dumps(message).encode())
        ends = Ends()
        topics = self.bench.settings.topics
        reading = asyncio.create_task(self._ended(len(messages) + known))
        while not reading.done():
            self._watch()
            assert self.process.is_running, self.process.tail(30)
            await asyncio.sleep(0.05)
        results, dead = reading.result()
        if results:
            for one in await self.bench.read(topics.results, results):
                record = json.loads(one.value)
                ends.records[record["document"]["uri"].removeprefix(f"s3://{self.bucket}/")] = record
        for headers, value in await self.bench.dead_letters(dead) if dead else []:
            key = unquote_plus(json.loads(value)["s3"]["object"]["key"])
            ends.codes[key] = headers["nanovllm_code"]
        ends.worker_growth = _status(self.process.pid, "VmHWM") - before
        return ends

    async def _ended(self, count: int) -> tuple[int, int]:
        while True:
            counted = await asyncio.to_thread(self.counted)
            results, dead = counted.get("result", 0), counted.get("dead_letter", 0)
            if sum(counted.values()) >= count:
                return results, dead
            await asyncio.sleep(0.2)

    def counted(self) -> dict[str, int]:
        """Events by what came of them."""
        found = re.findall(r'nanovllm_events_total\{outcome="(\w+)"\} ([0-9.]+)', self._get("/metrics"))
        return {outcome: int(float(number)) for outcome, number in found}

    async def settled_steps(self) -> int:
        """Steps of the engine so far, which the worker tells four times a second."""
        await asyncio.sleep(2.0)
        return self.engine_steps()

    def engine_steps(self) -> int:
        """Steps of the engine that were told last."""
        found = re.search(r"^nanovllm_engine_steps_total ([0-9.e+]+)$", self._get("/metrics"), re.MULTILINE)
        assert found
        return int(float(found[1]))

    def is_ready(self) -> bool:
        with suppress(OSError):
            return bool(self._get("/readyz"))
        return False

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def _watch(self) -> None:
        for pid in _children(self.process.pid):
            with suppress(OSError):
                if "nanovllm.vision.images.child" in Path(f"/proc/{pid}/cmdline").read_text():
                    self.decoder_peak = max(self.decoder_peak, _status(pid, "VmHWM"))


def _status(pid: int | None, name: str) -> int:
    """Bytes of memory of a process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _children(pid: int | None) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return found


@asynccontextmanager
async def working(broker: str, s3: S3Part, folder: Path) -> AsyncIterator[Process]:
    """A worker process at work inside, which has answered one document."""
    bucket, events, port = s3.make_bucket(), unique_name("events"), free_port()
    await create_topic(broker, events, partitions=1)
    routes = [
        {
            "name": "all",
            "match": {"bucket": bucket, "key": "in/**"},
            "sidecar": {"place": f"s3://{bucket}/out/{{key}}"},
        },
        {
            "name": "long",
            "match": {"bucket": bucket, "key": "long/*"},
            "pages": {"dpi": 72, "range": "1-3,-1", "max_pages": 10_000},
        },
        {"name": "short", "match": {"bucket": bucket, "key": "short/*"}, "pages": {"dpi": 72, "max_pages": 9_999}},
    ]
    file = folder / "routes.yaml"
    file.write_text(yaml.safe_dump({"version": 1, "defaults": ROUTE, "routes": routes}, sort_keys=False))
    async with bench_on(broker, unique_name, s3) as bench:
        settings = {
            **bench.environment,
            "NANOVLLM_TOPICS__EVENTS": events,
            "NANOVLLM_KAFKA__GROUP_ID": unique_name("group"),
            "NANOVLLM_DOCUMENTS__ROUTES": str(file),
            "NANOVLLM_DOCUMENTS__MAX_BYTES": str(MAX_BYTES),
            "NANOVLLM_IMAGES__DECODER_MEMORY_BYTES": str(DECODER_BYTES),
            "NANOVLLM_S3__ENDPOINT_URL": s3.endpoint_url,
            "NANOVLLM_S3__ADDRESSING_STYLE": "path",
            "NANOVLLM_HTTP__PORT": str(port),
            **s3.environment,
        }
        worker = Process(bench, s3, bucket, events, worker_process(folder, settings=settings), port)
        worker.process.start()
        try:
            await eventually(lambda: worker.is_ready() or not worker.process.is_running, within_s=120)
            assert worker.process.is_running, worker.process.tail(30)
            await worker.ends([worker.put("in/first.pdf", SCANNED)])
            yield worker
        finally:
            worker.process.stop()


async def good_and_alive(worker: Process, known: int) -> None:
    """Good documents have their records, a clean one without a step of the engine, and the worker is ready."""
    steps = await worker.settled_steps()
    ends = await worker.ends([worker.put("in/clean.pdf", CLEAN)], known)
    assert sources_in(ends.records["in/clean.pdf"]) == ["text_layer"]
    assert await worker.settled_steps() == steps
    ends = await worker.ends([worker.put("in/scan.pdf", SCANNED)], known + 1)
    assert sources_in(ends.records["in/scan.pdf"]) == ["model"]
    await eventually(lambda: worker.engine_steps() > steps)
    assert worker.is_ready()
    assert "Traceback" not in worker.process.log.read_text()


def sources_in(record: dict[str, Any]) -> list[str]:
    """Of the pages of ``record``: where their text is from, or their status where they have none."""
    return [page.get("source", page["status"]) for page in record["pages"]]


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.pdf", CLEAN)
    return buffer.getvalue()


HOSTILE: Mapping[str, tuple[bytes, str | None]] = {
    "zero bytes.pdf": (b"", "invalid_document"),
    "encrypted.pdf": (encrypted(CLEAN, "secret"), "document_encrypted"),
    "a picture.pdf": (png((200, 10, 10)), None),
    "a page.png": (CLEAN, None),
    "a web page.pdf": (b"<!DOCTYPE html><html><body>404</body></html>", "unsupported_document_format"),
    "an archive.pdf": (zipped(), "unsupported_document_format"),
    "half of one.pdf": (SCANNED[: len(SCANNED) // 2], "invalid_document"),
    "half of a picture.png": (png((1, 2, 3), (640, 480))[:100], "pages_failed"),
    "too large.pdf": (CLEAN + bytes(MAX_BYTES), "document_too_large"),
    "300 MB of black.pdf": (image_bomb_pdf(10_000), None),
}


@pytest.mark.slow
async def test_hostile_documents_end_with_codes_of_their_own_in_bounded_memory(
    embedded_broker: str, s3: S3Part, tmp_path: Path
) -> None:
    long = many_pages_pdf(10_000)
    async with working(embedded_broker, s3, tmp_path) as worker:
        old = worker.put("in/swapped.pdf", b"old") | {"eventTime": "2026-01-01T00:00:00Z"}
        messages = [worker.put(f"in/{name}", body) for name, (body, _) in HOSTILE.items()]
        messages += [old, worker.put("in/swapped.pdf", CLEAN)]
        messages += [worker.put("long/10000.pdf", long), worker.put("short/10000.pdf", long)]
        ends = await worker.ends(messages, known=1)
        assert worker.counted()["source_changed"] == 1
        expected = {f"in/{name}": code for name, (_, code) in HOSTILE.items() if code is not None}
        assert ends.codes == expected | {"short/10000.pdf": "too_many_pages"}
        assert ends.records.keys() == {
            *("in/first.pdf", "in/swapped.pdf", "long/10000.pdf"),
            *(f"in/{name}" for name, (_, code) in HOSTILE.items() if code is None),
        }
        assert [page["number"] for page in ends.records["long/10000.pdf"]["pages"]] == [1, 2, 3, 10_000]
        await good_and_alive(worker, 1 + len(messages))
        assert 0 < worker.decoder_peak < DECODER_BYTES
        assert ends.worker_growth < WORKER_GROWTH


CODES = {
    "in/ocrmypdf/invalid.pdf": "invalid_document",
    "in/pikepdf/graph-encrypted.pdf": "document_encrypted",
    "in/pikepdf/newline-buffer-test.pdf": "document_encrypted",
    "in/pypdfium2/encrypted.pdf": "document_encrypted",
    "in/pikepdf/378014596.pdf": "pages_failed",  # invalid_page, its only one
}


@pytest.mark.proof
async def test_each_document_of_the_corpus_ends_with_a_record_or_a_code_of_its_own_in_bounded_memory(
    embedded_broker: str, s3: S3Part, tmp_path: Path
) -> None:
    try:
        corpus = documents_of(fetch())
    except subprocess.CalledProcessError:
        pytest.skip("pip cannot download the archives of tools/document_corpus.py here")
    async with working(embedded_broker, s3, tmp_path) as worker:
        names = {f"in/{name}" for name in corpus}
        ends = await worker.ends([worker.put(f"in/{name}", body) for name, body in corpus.items()], known=1)
        assert ends.codes == CODES
        sources = Counter(
            source for name, record in ends.records.items() if name in names for source in sources_in(record)
        )
        assert len(ends.records) - 1 + len(ends.codes) == len(corpus) == 99
        assert sources == {"text_layer": 77, "model": 72, "blank": 11}
        await good_and_alive(worker, 1 + len(corpus))
        # 444 and 49 MiB on the machine where this was written.
        assert 0 < worker.decoder_peak < DECODER_BYTES
        assert ends.worker_growth < WORKER_GROWTH
