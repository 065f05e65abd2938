"""A drill of ``engine.backend: openai``: two workers before two servers that fail in every way, and what came of it.

    python tests/chaos/remote_drill.py --seed 1 --delivery exactly_once --out build/chaos

The servers are tasks of this process, each behind an `EndpointProxy`; Apache Kafka, the S3 server and the workers are
processes. Writes one JSON a seed and mode, and leaves alone what is there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aiokafka import AIOKafkaProducer
from chaos.checker import ANSWER, Expectation, Ledger, broken_promises
from chaos.endpoint_proxy import FAULTS, EndpointProxy
from chaos.remote_parts import REFUSED, SECRET, RemoteFleet, Server
from document_world import committed_in
from parts import KafkaNode, S3Part, VersityNode, eventually, png
from world import World

from nanovllm.client.results import ResultReader
from nanovllm.messages.job import ImageRef, Job
from nanovllm.vision.images.preprocess import prepare_image

OBJECTS = 12
MAX_CONCURRENCY = 4
HITS = 3
"""Requests that each fault meets at least."""
FAULT_S = 30.0
"""Longest wait for them."""
FINISH_S = 120.0
JOBS_A_SECOND = 30
MAX_WORKER_MIB = 256
LEAST_SHARE = 0.75
"""Of the requests with an image at one endpoint; 0.6 without a preference."""
EVERY_FAULT = (*FAULTS, "restart")
SETTINGS = {
    "NANOVLLM_LOG_LEVEL": "debug",
    "NANOVLLM_KAFKA__SESSION_TIMEOUT_MS": "3000",
    "NANOVLLM_KAFKA__HEARTBEAT_INTERVAL_MS": "500",
    "NANOVLLM_ADMISSION__DRAIN_TIMEOUT_S": "5",
    "NANOVLLM_ENGINE__BACKEND": "openai",
    "NANOVLLM_ENGINE__MODEL": "tiny",
    "NANOVLLM_ENGINE__MAX_NUM_SEQS": str(2 * MAX_CONCURRENCY),
    "NANOVLLM_REMOTE__DIALECT": "vllm",
    "NANOVLLM_REMOTE__MAX_CONCURRENCY": str(MAX_CONCURRENCY),
    "NANOVLLM_REMOTE__CONNECT_TIMEOUT_S": "2",
    "NANOVLLM_REMOTE__READ_TIMEOUT_S": "1.5",
    "NANOVLLM_REMOTE__REQUEST_TIMEOUT_S": "5",
    "NANOVLLM_REMOTE__BREAKER_WAIT_S": "0.2",
    "NANOVLLM_REMOTE__BREAKER_MAX_WAIT_S": "1",
    "NANOVLLM_REMOTE__IMAGE_TRANSPORT": "presigned",
}


@dataclass
class RemoteDrill:
    """The parts of one drill."""

    world: World
    proxies: list[EndpointProxy]
    fleet: RemoteFleet
    random: Random
    ledger: Ledger = field(default_factory=Ledger)
    texts: dict[str, str] = field(default_factory=dict)
    copies: Counter[str] = field(default_factory=Counter)
    unmet: list[str] = field(default_factory=list)
    struck: Counter[str] = field(default_factory=Counter)
    is_feeding: bool = True
    _objects: list[tuple[bytes, str, ImageRef]] = field(default_factory=list)

    async def put_objects(self) -> None:
        transform = self.proxies[0].server.engine.image_transform
        assert transform is not None
        for number in range(OBJECTS):
            body = png((number, self.random.randrange(256), 9))
            where = {"Bucket": self.world.bucket, "Key": f"{number}.png"}
            put = await asyncio.to_thread(self.world.s3.client.put_object, Body=body, **where)
            ref = ImageRef(uri=f"s3://{self.world.bucket}/{number}.png", version_id=put["VersionId"])
            self._objects.append((body, prepare_image(body, transform).digest.hex(), ref))

    async def feed(self) -> None:
        """Jobs at a steady pace."""
        async with AIOKafkaProducer(
            bootstrap_servers=self.world.bootstrap_servers, enable_idempotence=True
        ) as producer:
            while self.is_feeding:
                job = self._draw(len(self.ledger.expected) + 1)
                value = job.model_dump_json(exclude_none=True, exclude_unset=True).encode()
                copies = 2 if self.random.random() < 0.05 else 1
                self.copies[str(job.job_id)] = copies
                self.ledger.late[str(job.job_id)] = copies - 1
                for _ in range(copies):
                    await producer.send_and_wait(self.world.topics.jobs, value)
                await asyncio.sleep(1 / JOBS_A_SECOND)

    def _draw(self, number: int) -> Job:
        job_id, kind = f"job-{number:05d}", self.random.random()
        text = f"Say {number}"
        job, outcomes, expected = Job(job_id=job_id, prompt=text), {ANSWER}, text
        if kind < 0.03:
            job, outcomes = job.model_copy(update={"prompt": f"{text}: {REFUSED}"}), {"invalid_input"}
        elif kind < 0.06:
            hours = self.random.choice((-1, 1))
            job = job.model_copy(update={"deadline": datetime.now(UTC) + timedelta(hours=hours)})
            outcomes = {ANSWER} if hours > 0 else {"deadline_exceeded"}
        elif kind < 0.09:
            # Servers may be away for longer.
            job = job.model_copy(update={"deadline": datetime.now(UTC) + timedelta(seconds=4)})
            outcomes = {ANSWER, "deadline_exceeded"}
        elif kind < 0.14:
            job = job.model_copy(update={"sampling": {"choice": ["no", f"yes {number}"]}})
            expected = f"yes {number}"
        elif kind < 0.19:
            schema = {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}
            job = job.model_copy(update={"sampling": {"json_schema": schema}})
            expected = f'{{"number":{number}}}'
        elif kind < 0.65:
            body, digest, named = self.random.choice(self._objects)
            image = self.random.choices((named, ImageRef(uri=named.uri), ImageRef(data=body)), (8, 1, 1))[0]
            job = job.model_copy(update={"prompt": f"{text} <|image|>", "images": (image,)})
            expected = f"{text}  {digest}"
        self.ledger.expected[job_id] = Expectation(frozenset(outcomes), expected)
        self.texts[job_id] = expected
        return job

    async def read(self, reader: ResultReader) -> int:
        outcomes = await reader.read()
        for outcome in outcomes:
            self.ledger.see(outcome)
        return len(outcomes)

    async def watch(self, reader: ResultReader) -> None:
        """See outcomes and workers while jobs come."""
        while True:
            await self.read(reader)
            await self.fleet.look()
            await asyncio.sleep(0.2)

    @property
    def pending(self) -> list[str]:
        """Jobs with fewer ends than they were sent."""
        seen = Counter({job: len(ends) for job, ends in self.ledger.results.items()})
        seen.update({job: len(ends) for job, ends in self.ledger.dead_letters.items()})
        return sorted(job for job, copies in self.copies.items() if seen[job] < copies)

    @property
    def wrong_texts(self) -> list[str]:
        """Jobs that an answer with another text than theirs has come for."""
        results = self.ledger.results.items()
        return sorted(job for job, ends in results if any(end.text != self.texts.get(job) for end in ends))

    async def calm(self) -> float:
        """No faults: of the requests with an image, the share at the endpoint that has most of that image's."""
        servers = [proxy.server for proxy in self.proxies]
        # What came while no worker was ready goes wherever there is room.
        await eventually(lambda: self.ledger.results and len(self.pending) < JOBS_A_SECOND / 2)
        before = [server.images.copy() for server in servers]
        await eventually(lambda: sum((servers[n].images - before[n]).total() for n in (0, 1)) >= 6 * OBJECTS)
        one, other = (server.images - old for server, old in zip(servers, before, strict=True))
        return sum((one | other).values()) / (one + other).total()

    async def move(self) -> dict[str, int]:
        """One endpoint goes away, until the other one has the load; it comes back, and so does its load."""
        away, stays = self.random.sample(self.proxies, 2)
        found = {}
        for name, proxy in (("moved", stays), ("came_back", away)):
            await (away.stop() if name == "moved" else away.start())
            before = proxy.answered
            await eventually(lambda proxy=proxy, before=before: proxy.answered >= before + 15, why=f"nothing {name}")
            found[f"answers_that_{name}"] = proxy.answered - before
        return found

    async def black_out(self) -> None:
        """Neither endpoint takes connections."""
        for proxy in self.proxies:
            await proxy.stop()
        await asyncio.sleep(self.random.uniform(1.0, 3.0))
        for proxy in self.proxies:
            await proxy.start()

    async def recover(self) -> None:
        """Both endpoints have load when all is well."""
        before = [proxy.answered for proxy in self.proxies]
        await eventually(
            lambda: all(one.answered >= old + 10 for one, old in zip(self.proxies, before, strict=True)),
            why="an endpoint gets no load though all is well",
        )

    async def strike(self, faults: Sequence[str], kills: int) -> None:
        """Each fault once, at one endpoint or the other, while workers are killed and drained."""
        plan = self.random.sample(faults, len(faults))
        plans = plan[::2], plan[1::2]
        blows = self.random.sample(["kill", "drain"] * kills, 2 * kills)
        async with asyncio.TaskGroup() as group:
            for proxy, plan in zip(self.proxies, plans, strict=True):
                group.create_task(self._strike_endpoint(proxy, plan))
            group.create_task(self._strike_workers(blows))

    async def _strike_endpoint(self, proxy: EndpointProxy, faults: list[str]) -> None:
        for fault in faults:
            self.struck[fault] += 1
            if fault == "restart":
                await proxy.server.start_again()
            elif fault == "refuse":
                await proxy.stop()
                await asyncio.sleep(self.random.uniform(1.0, 2.0))
                await proxy.start()
            else:
                proxy.fault, proxy.share = fault, self.random.choice((0.6, 1.0))
                before = proxy.struck[fault]
                with contextlib.suppress(AssertionError):
                    await eventually(partial(self._has_struck, proxy, fault, before + HITS), within_s=FAULT_S)
                if proxy.struck[fault] == before:
                    self.unmet.append(fault)
                proxy.fault = None

    def _has_struck(self, proxy: EndpointProxy, fault: str, hits: int) -> bool:
        # What a worker counts between the last look and its kill is lost.
        kind = FAULTS.get(fault)
        return proxy.struck[fault] >= hits and (kind is None or self.fleet.faults()[kind] > 0)

    async def _strike_workers(self, blows: list[str]) -> None:
        for blow in blows:
            await asyncio.sleep(self.random.uniform(3.0, 6.0))
            self.struck[blow] += 1
            name = self.fleet.any_name()
            await self.fleet.look()
            if blow == "kill":
                self.fleet.kill(name)
            else:
                await self.fleet.remove(name)
                self.fleet.add(name)


async def run_remote_drill(
    brokers: str,
    s3: S3Part,
    directory: Path,
    *,
    seed: int,
    delivery: str,
    kills: int,
    faults: Sequence[str] = EVERY_FAULT,
) -> dict[str, Any]:
    """Each of ``faults``, and so many ``kills`` of workers and as many drains; the report says what was seen.

    What has not ended ``FINISH_S`` seconds after the last fault counts as lost.
    """
    random, started = Random(f"{seed}-{delivery}"), time.monotonic()
    settings = {**SETTINGS, "NANOVLLM_DELIVERY": delivery}
    world = World(brokers, s3, directory, settings, bucket=s3.make_bucket(versioned=True))
    await world.create_topics()
    async with _endpoints(random) as (proxies, trapped), RemoteFleet(world, proxies, random) as fleet:
        drill = RemoteDrill(world, proxies, fleet, random)
        await drill.put_objects()
        async with world.reader() as reader, asyncio.TaskGroup() as group:
            feeding, watching = group.create_task(drill.feed()), group.create_task(drill.watch(reader))
            share = await drill.calm()
            moved = await drill.move()
            await drill.black_out()
            await drill.strike(faults, kills)
            await drill.recover()
            drill.is_feeding = False
            await feeding
            with contextlib.suppress(AssertionError):
                await eventually(lambda: not drill.pending, within_s=FINISH_S)
            await fleet.look()
            watching.cancel()
            await asyncio.wait([watching])
            exit_codes = await fleet.drain()
            quiet = 0
            while quiet < 4:
                quiet = 0 if await drill.read(reader) else quiet + 1
        report = {
            **drill.ledger.check({0: await world.lag()}),
            "wrong_texts": drill.wrong_texts,
            "copies_lost": drill.pending,
            "sent_twice": sum(times > 1 for times in drill.copies.values()),
            "faults_that_met_no_request": drill.unmet,
            "kinds_not_counted": sorted({FAULTS[one] for one in faults if FAULTS.get(one)} - fleet.faults().keys()),
            "requests_before_retry_after": [early for proxy in proxies for early in proxy.early],
            "clients_over_max_concurrency": [
                most for proxy in proxies for most in proxy.most_at_once().values() if len(most) > MAX_CONCURRENCY
            ],
            "requests_to_the_target_of_redirections": len(trapped),
            "api_keys_shown": fleet.leaks + await _leaks(world),
            "unexpected_ends": [code for code in (*fleet.exit_codes, *exit_codes) if code not in (0, -9)],
            "share_of_images_at_one_endpoint": round(share, 3),
            "objects_fetched_by_endpoints": [proxy.server.fetched for proxy in proxies],
            "most_worker_mib": fleet.most_bytes // 2**20,
        }
    # Of a job that was sent twice the checker knows but one.
    del report["doubled_by_the_broker"], report["held_back_by_the_broker"], report["object_replaced_between"]
    return {
        "seed": seed,
        "delivery": delivery,
        "broken_promises": _broken(report, delivery),
        **report,
        **moved,
        "faults_counted_by_kind": dict(sorted(fleet.faults().items())),
        "requests_struck": dict(sorted(sum((proxy.struck for proxy in proxies), Counter()).items())),
        "strikes": dict(sorted(drill.struck.items())),
        "answered_by_endpoint": [proxy.answered for proxy in proxies],
        "most_requests_at_once": max(len(most) for proxy in proxies for most in proxy.most_at_once().values()),
        "most_bytes_of_an_endless_answer": max(proxy.most_bytes for proxy in proxies),
        "worker_starts": fleet.starts,
        "seconds": round(time.monotonic() - started, 1),
    }


@contextlib.asynccontextmanager
async def _endpoints(random: Random) -> AsyncIterator[tuple[list[EndpointProxy], list[bytes]]]:
    """Two servers behind their proxies, and what came to the place that redirections lead to."""
    trapped: list[bytes] = []

    async def trap(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        trapped.append(await reader.read(65_536))
        writer.close()

    async with contextlib.AsyncExitStack() as stack:
        other = await stack.enter_async_context(await asyncio.start_server(trap, "127.0.0.1", 0))
        url = f"http://localhost:{other.sockets[0].getsockname()[1]}/v1/chat/completions"
        proxies = []
        for _ in range(2):
            server = await stack.enter_async_context(Server())
            proxies.append(EndpointProxy(server, url, random))
            await proxies[-1].start()
            stack.push_async_callback(proxies[-1].stop)
        yield proxies, trapped


async def _leaks(world: World) -> list[str]:
    """Where an API key stands that should not."""
    found = [log.name for log in world.directory.glob("*.log") if SECRET in log.read_text(errors="replace")]
    for topic in (world.topics.results, world.topics.dead_letters, world.topics.metrics):
        records = await committed_in(world.bootstrap_servers, topic)
        found += [
            topic for record in records if SECRET.encode() in (record.value or b"") + repr(record.headers).encode()
        ]
    return found


def _broken(report: Mapping[str, Any], delivery: str) -> list[str]:
    """The kinds of finding that no drill may have."""
    forbidden = (
        *("wrong_texts", "copies_lost", "faults_that_met_no_request", "kinds_not_counted"),
        *("requests_before_retry_after", "clients_over_max_concurrency", "requests_to_the_target_of_redirections"),
        *("api_keys_shown", "unexpected_ends"),
    )
    broken = broken_promises(report, delivery) + [kind for kind in forbidden if report[kind]]
    if report["share_of_images_at_one_endpoint"] < LEAST_SHARE:
        broken.append("share_of_images_at_one_endpoint")
    if report["most_worker_mib"] > MAX_WORKER_MIB:
        broken.append("most_worker_mib")
    if not all(report["objects_fetched_by_endpoints"]):
        broken.append("objects_fetched_by_endpoints")
    return broken


async def _main(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    store = VersityNode(directory / "s3")
    s3 = store.start()
    try:
        async with KafkaNode(directory) as node:
            return await run_remote_drill(
                node.bootstrap_servers,
                s3,
                directory,
                seed=options.seed,
                delivery=options.delivery,
                kills=options.kills,
            )
    finally:
        store.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--kills", type=int, default=2, help="SIGKILLs of workers, and as many SIGTERMs")
    parser.add_argument("--delivery", choices=["at_least_once", "exactly_once"], required=True)
    parser.add_argument("--out", type=Path, default=Path("build/chaos"), help="a drill whose JSON is there is not run")
    options = parser.parse_args()
    file = options.out / f"seed-{options.seed}-{options.delivery}-openai.json"
    if file.exists():
        print(f"{file} is there already")
        return 0
    with tempfile.TemporaryDirectory(prefix="nanovllm-chaos-") as temporary:
        report = asyncio.run(_main(options, Path(temporary)))
        if report["broken_promises"]:
            for log in Path(temporary).glob("*.log"):
                (options.out / "failed").mkdir(parents=True, exist_ok=True)
                (options.out / "failed" / f"{file.stem}-{log.name}").write_bytes(log.read_bytes())
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 1 if report["broken_promises"] else 0


if __name__ == "__main__":
    sys.exit(main())
