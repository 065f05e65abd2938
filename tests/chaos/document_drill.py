"""Workers killed (SIGKILL) at drawn steps while documents are half gathered, and what came of every document."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from aiokafka import AIOKafkaProducer
from chaos.killed_worker import COMMITTING, DOCUMENT_STEPS, KEPT, LOOKED, MISSED, PAGE_STEPS
from document_files import drawn, receipts_pdf, receipts_route, shared_pages
from document_world import KEPT as PARTS
from document_world import DocumentWorld
from parts import eventually
from world import PARTITIONS

from nanovllm.demo.child_process import LocalProcess
from nanovllm.pipeline.events.envelope import parse_events

PROGRAM = Path(__file__).with_name("killed_worker.py")
SETTINGS = {
    "NANOVLLM_KAFKA__SESSION_TIMEOUT_MS": "2000",
    "NANOVLLM_KAFKA__HEARTBEAT_INTERVAL_MS": "400",
    # Few at work: a kill falls into the work and not behind it.
    "NANOVLLM_ENGINE__MAX_NUM_SEQS": "4",
    "NANOVLLM_ADMISSION__MAX_JOBS": "4",
    "NANOVLLM_DOCUMENTS__PAGES_AT_ONCE": "2",
}
FINISH_S = 240.0


@dataclass
class KilledFleet:
    """Workers that are started again; each start draws the step that is its last, until there were enough ``kills``."""

    documents: DocumentWorld
    random: Random
    kills: int
    steps: tuple[str, ...]
    killed: Counter[str] = field(default_factory=Counter)
    exit_codes: list[int | None] = field(default_factory=list)
    _workers: dict[str, tuple[LocalProcess, str]] = field(default_factory=dict)
    _drawn: list[str] = field(default_factory=list)

    @property
    def journal(self) -> Path:
        return self.documents.world.directory / "journal"

    def start(self, name: str) -> None:
        step, count = "none", 0
        if self.killed.total() < self.kills:
            # Each step as often as every other.
            self._drawn = self._drawn or self.random.sample(self.steps, len(self.steps))
            step = self._drawn.pop()
            count = self.random.randint(4, 16) if step in PAGE_STEPS else self.random.randint(1, 4)
        worker = self.documents.world.worker(name, program=(str(PROGRAM), str(self.journal), step, str(count)))
        worker.start()
        self._workers[name] = (worker, step)

    def start_again(self) -> None:
        for name, (worker, step) in list(self._workers.items()):
            if not worker.is_running:
                self.exit_codes.append(worker.exit_code)
                self.killed[step] += 1
                self.start(name)

    async def stop(self) -> None:
        """SIGTERM to those that are not told to die, SIGKILL to the others."""
        for worker, step in self._workers.values():
            if step == "none":
                assert await asyncio.to_thread(worker.stop, 30.0) == 0, worker.tail(30)

    def kill(self) -> None:
        for worker, _ in self._workers.values():
            worker.kill()


async def run_document_drill(
    documents: DocumentWorld, *, seed: int, delivery: str, objects: int = 40, kills: int = 5, workers: int = 2
) -> dict[str, Any]:
    """Put documents of 2 to 6 pages, kill workers, send some notifications again, and check when all is done."""
    random, began = Random(f"{seed}-{delivery}"), time.monotonic()
    world = documents.world
    world.worker_settings |= {"NANOVLLM_DELIVERY": delivery, **SETTINGS}
    documents.write_routes(receipts_route(world.bucket))
    numbers = shared_pages(random, random.choices(range(2, 7), k=objects), share=0.3)
    receipts = {number: drawn(1, first=60_000 + number)[0].image for pages in numbers for number in pages}
    put: dict[str, str] = {}
    for number, pages in enumerate(numbers):
        key = f"in/{number}.pdf"
        put[key] = documents.put(key, receipts_pdf([receipts[one] for one in pages]))
    steps = tuple(one for one in (*PAGE_STEPS, *DOCUMENT_STEPS) if one != COMMITTING or delivery == "exactly_once")
    fleet = KilledFleet(documents, random, kills, steps)
    try:
        for number in range(workers):
            fleet.start(f"w{number}")
        await _resend(documents, random)
        await _until_done(documents, fleet)
        await fleet.stop()
    finally:
        fleet.kill()
    found = await documents.records()
    times = Counter((record.document.uri.partition("/in/")[2], record.document.etag) for record in found)
    versions = {(key.removeprefix("in/"), etag) for key, etag in put.items()}
    ids: dict[tuple[str, str | None], set[str]] = defaultdict(set)
    for record in found:
        ids[record.document.uri.partition("/in/")[2], record.document.etag].add(record.result_id)
    by_id = {record.job_id: record for record in found}
    journal = [line.split() for line in fleet.journal.read_text().splitlines()]
    sidecars = [documents.sidecar(key) for key in put]
    return {
        "seed": seed,
        "delivery": delivery,
        "lost": sorted(versions - times.keys()),
        "unknown": sorted(times.keys() - versions),
        "repeated": sorted(version for version, count in times.items() if count > 1),
        "differing": sorted(version for version, some in ids.items() if len(some) > 1),
        "dead_letters": [dict(one.headers) for one in await documents.read(world.topics.dead_letters)],
        "sidecars_of_other_content": [one.job_id for one in sidecars if one.value != by_id[one.job_id].value],
        "computed_again": sorted(computed_again(journal)),
        "reconcile": await _reconcile(documents),
        "documents": objects,
        "records": len(found),
        "pages": sum(map(len, numbers)),
        "distinct_pages": len(receipts),
        "kept_pages": len(documents.keys(f"{PARTS}/")),
        "engine_requests": sum(step == MISSED for _, step, _ in journal),
        "reused_pages": sum(page.reused for record in by_id.values() for page in record.pages),
        "kills": dict(sorted(fleet.killed.items())),
        "exit_codes": dict(Counter(fleet.exit_codes)),
        "seconds": round(time.monotonic() - began, 1),
    }


def broken_promises(report: dict[str, Any]) -> list[str]:
    """The kinds of finding that the report has, and its delivery mode forbids."""
    forbidden = ["lost", "unknown", "differing", "dead_letters", "sidecars_of_other_content", "computed_again"]
    if report["delivery"] == "exactly_once":
        forbidden.append("repeated")
    return [kind for kind in (*forbidden, "reconcile") if report[kind]]


def computed_again(journal: Iterable[list[str]]) -> set[str]:
    """Pages that the engine was asked for though they were kept before the page store was asked.

    ``journal``: process, step and page. A page that was asked for before it was kept, by whatever worker, is under way
    twice, and that is none.
    """
    kept: set[str] = set()
    early: Counter[tuple[str, str]] = Counter()
    again = set()
    for process, step, page in journal:
        if step == KEPT:
            kept.add(page)
        elif step == LOOKED and page not in kept:
            early[process, page] += 1
        elif step == MISSED:
            early[process, page] -= 1
            if early[process, page] < 0:
                again.add(page)
    return again


async def _resend(documents: DocumentWorld, random: Random) -> None:
    """Copies of a third of the notifications, in another order, to any partition."""
    topic = documents.world.topics.events
    values = [one.value for one in await documents.read(topic)]
    values = [value for value in values if any(event.key.endswith(".pdf") for event in parse_events(value))]
    async with AIOKafkaProducer(bootstrap_servers=documents.world.bootstrap_servers) as producer:
        for value in random.sample(values, len(values) // 3):
            await producer.send_and_wait(topic, value, partition=random.randrange(PARTITIONS))


async def _until_done(documents: DocumentWorld, fleet: KilledFleet) -> None:
    events, quiet = documents.world.topics.events, 0
    async with asyncio.timeout(FINISH_S):
        while quiet < 4:
            fleet.start_again()
            quiet = quiet + 1 if await documents.world.lag(events) == 0 else 0
            await asyncio.sleep(0.3)


async def _reconcile(documents: DocumentWorld) -> int | None:
    """Exit code of ``nanovllm reconcile --check``."""
    options = ["--routes", str(documents.routes), "--route", "receipts", "--check"]
    program = ["-m", "nanovllm.cli.main", "reconcile", f"s3://{documents.world.bucket}/in"]
    process = documents.world.process("reconcile", *program, *options)
    process.start()
    await eventually(lambda: not process.is_running)
    return process.exit_code
