"""One drill: a seed, so many jobs, so many faults, three workers on Apache Kafka, and what came of every job.

    python tests/chaos/drill.py --seed 1 --jobs 2000 --faults 40 --delivery exactly_once --out build/chaos

``--brokers 3``: a cluster with replication 3, one broker at a time restarted or killed. ``--backend native``: the
shipped model answers. Writes one JSON a seed, mode, number of brokers and backend, and leaves alone what is there.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError
from chaos.broker_logs import late_commits
from chaos.checker import ANSWER, Expectation, Ledger, broken_promises
from chaos.faulty_worker import POISON
from chaos.fleet import Fleet
from chaos.proxies import S3Fault, S3Proxy, TcpProxy
from parts import KafkaNode, S3Part, VersityNode, create_topic, kafka_cluster, png
from world import PARTITIONS, World

from nanovllm.messages.job import ImageRef, Job, derive_job_id

OBJECTS = 40
WORKERS = 3
SESSION_S = 3.0
FINISH_S = 300.0
UNSTABLE_S = 45.0  # longer than the workers' transactions may take
S3_FAULTS: tuple[S3Fault, ...] = ("unavailable", "slow", "truncated", "reset", "wrong_length")
SETTINGS = {
    "NANOVLLM_KAFKA__SESSION_TIMEOUT_MS": str(int(SESSION_S * 1000)),
    "NANOVLLM_KAFKA__HEARTBEAT_INTERVAL_MS": "500",
    "NANOVLLM_ADMISSION__DRAIN_TIMEOUT_S": "3",
    "NANOVLLM_S3__READ_TIMEOUT_S": "3",
    "NANOVLLM_DEAD_LETTERS__CRASH_LIMIT": "3",
}
CULPRIT_EVERY = 1_000


class Brokers:
    """Apache Kafka nodes, each behind a proxy that it calls itself by."""

    def __init__(self, directory: Path, count: int) -> None:
        self.proxies = [TcpProxy(0) for _ in range(count)]
        self.nodes: list[KafkaNode] = []
        self._folders = [directory] if count == 1 else [directory / f"broker-{number}" for number in range(count)]

    @property
    def bootstrap_servers(self) -> str:
        return ",".join(f"127.0.0.1:{proxy.port}" for proxy in self.proxies)

    async def start(self) -> None:
        for proxy, folder in zip(self.proxies, self._folders, strict=True):
            await proxy.start()
            folder.mkdir(exist_ok=True)
            node = KafkaNode(folder, settings={"advertised.listeners": f"PLAINTEXT://127.0.0.1:{proxy.port}"})
            proxy.upstream_port = node.port
            self.nodes.append(node)
        if len(self.nodes) > 1:
            kafka_cluster(self.nodes)
        await asyncio.gather(*(node.start() for node in self.nodes))

    def late_commits(self, *topics: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for node in self.nodes:
            found |= late_commits(node.data, topics)
        return found

    def stop(self) -> None:
        for node in self.nodes:
            node.kill()
        for proxy in self.proxies:
            proxy.stop()


class Drill:
    """The parts of one drill, and a method for each kind of fault."""

    def __init__(self, world: World, brokers: Brokers, s3: S3Proxy, fleet: Fleet, random: Random, says: bool):
        self._world, self._brokers, self._s3, self._fleet = world, brokers, s3, fleet
        self._random = random
        self._says = says  # whether answers repeat their prompts, as the echo does
        self._number = 0
        self._objects: list[tuple[str, bytes]] = []
        self.ledger = Ledger()
        s3_faults = {f"s3_{fault}": self._s3_fault(fault) for fault in S3_FAULTS}
        self.faults: dict[str, Callable[[], Awaitable[None]]] = {
            "kill": self._kill,
            "zombie": self._zombie,
            "leave": self._leave,
            "join": self._join,
            "broker_restart": self._broker_restart,
            "broker_kill": self._broker_kill,
            "connections_cut": self._cut,
            "connections_slow": self._slow,
            "object_replaced": self._replace_object,
            "object_deleted": self._delete_object,
            "out_of_memory": self._engine_fault("out-of-memory"),
            "crash": self._engine_fault("crash"),
            "dead_letters_unwritable": self._dead_letters_unwritable,
            **s3_faults,
        }

    def plan(self, count: int) -> list[str]:
        """Every kind as often as every other, in the seed's own order."""
        kinds: list[str] = []
        while len(kinds) < count:
            kinds += self._random.sample(sorted(self.faults), len(self.faults))
        return kinds[:count]

    async def put_objects(self) -> None:
        for number in range(OBJECTS):
            body = png((number, self._random.randrange(256), 7))
            uri = await asyncio.to_thread(self._world.s3.put, self._world.bucket, f"{number}.png", body)
            self._objects.append((uri, body))

    async def produce(self, producer: AIOKafkaProducer, count: int) -> None:
        await asyncio.gather(*(self._produce_one(producer) for _ in range(count)))

    async def _produce_one(self, producer: AIOKafkaProducer) -> None:
        self._number += 1
        job_id, kind = f"job-{self._number:05d}", self._random.random()
        prompt = f"Say {self._number}"
        said = prompt if self._says else None
        expected = Expectation(frozenset({ANSWER}), said)
        job = Job(job_id=job_id, prompt=prompt)
        if self._number % CULPRIT_EVERY == CULPRIT_EVERY // 2:
            job = job.model_copy(update={"prompt": POISON})
            expected = Expectation(frozenset({"crashed_worker"}))
        elif kind < 0.04:
            value = b"{no job at all %d" % self._number
            sent = await producer.send_and_wait(self._world.topics.jobs, value)
            derived = derive_job_id(self._world.topics.jobs, sent.partition, sent.offset)
            self.ledger.expected[derived] = Expectation(frozenset({"invalid_job"}))
            return
        elif kind < 0.07:
            # Clocks of producers are wrong: an hour behind, an hour ahead.
            is_behind = self._random.random() < 0.5
            deadline = datetime.now(UTC) + timedelta(hours=-1 if is_behind else 1)
            job = job.model_copy(update={"deadline": deadline})
            if is_behind:
                expected = Expectation(frozenset({"deadline_exceeded"}))
        elif kind < 0.3:
            uri, body = self._random.choice(self._objects)
            sha256 = hashlib.sha256(body).hexdigest() if self._random.random() < 0.5 else None
            job = job.model_copy(
                update={"prompt": f"{prompt} <|image|>", "images": (ImageRef(uri=uri, sha256=sha256),)}
            )
            # Its object may be replaced, deleted or unreadable for longer than the attempts last.
            codes = {ANSWER, "object_changed", "object_not_found", "fetch_failed", "invalid_image"}
            expected = Expectation(frozenset(codes), said, is_fixed=sha256 is not None)
        self.ledger.expected[job_id] = expected
        value = job.model_dump_json(exclude_none=True, exclude_unset=True).encode()
        await producer.send_and_wait(self._world.topics.jobs, value)

    async def _kill(self) -> None:
        self._fleet.kill(self._fleet.any_name())

    async def _zombie(self) -> None:
        await self._fleet.stop_for(self._fleet.any_name(), SESSION_S + self._random.uniform(0.5, 2.0))

    async def _leave(self) -> None:
        name = self._fleet.any_name()
        await self._fleet.remove(name)
        self._fleet.add(name)

    async def _join(self) -> None:
        self._fleet.add("guest")
        await asyncio.sleep(SESSION_S)
        await self._fleet.remove("guest")

    async def _broker_restart(self) -> None:
        node = self._random.choice(self._brokers.nodes)
        await asyncio.to_thread(node.stop)
        await node.start()

    async def _broker_kill(self) -> None:
        node = self._random.choice(self._brokers.nodes)
        node.kill()
        await node.start()

    async def _cut(self) -> None:
        for _ in range(3):
            for proxy in self._brokers.proxies:
                proxy.cut()
            await asyncio.sleep(self._random.uniform(0.05, 0.5))

    async def _slow(self) -> None:
        await self._delay(self._random.uniform(0.02, 0.2))
        await asyncio.sleep(2.0)
        await self._delay(0.0)

    async def _delay(self, seconds: float) -> None:
        for proxy in self._brokers.proxies:
            proxy.delay_s = seconds

    def _s3_fault(self, fault: S3Fault) -> Callable[[], Awaitable[None]]:
        async def spoil() -> None:
            self._s3.fault = fault
            await asyncio.sleep(2.0)
            self._s3.fault = "none"

        return spoil

    async def _replace_object(self) -> None:
        number = self._random.randrange(OBJECTS)
        other = png((number, self._random.randrange(256), 8))
        await asyncio.to_thread(self._world.s3.put, self._world.bucket, f"{number}.png", other)

    async def _delete_object(self) -> None:
        key = f"{self._random.randrange(OBJECTS)}.png"
        await asyncio.to_thread(self._world.s3.client.delete_object, Bucket=self._world.bucket, Key=key)

    def _engine_fault(self, fault: str) -> Callable[[], Awaitable[None]]:
        async def strike() -> None:
            (self._world.directory / f"{self._fleet.any_name()}.{fault}").touch()

        return strike

    async def _dead_letters_unwritable(self) -> None:
        replicas = len(self._brokers.nodes)
        await self._require_replicas(replicas + 1)
        await asyncio.sleep(2.0)
        await self._require_replicas(max(1, replicas - 1))

    async def _require_replicas(self, count: int) -> None:
        topic = ConfigResource(
            ConfigResourceType.TOPIC, self._world.topics.dead_letters, {"min.insync.replicas": str(count)}
        )
        for _ in range(20):
            admin = AIOKafkaAdminClient(bootstrap_servers=self._world.bootstrap_servers)
            try:
                await admin.start()
                await admin.alter_configs([topic])
                return
            except KafkaError:
                await asyncio.sleep(0.5)
            finally:
                await admin.close()
        raise RuntimeError("the dead-letter topic's settings could not be changed")


async def run_drill(
    directory: Path,
    s3: S3Part,
    s3_port: int,
    *,
    seed: int,
    jobs: int,
    faults: int,
    delivery: str,
    finish_s: float = FINISH_S,
    brokers: int = 1,
    backend: str = "echo",
) -> dict[str, Any]:
    """Produce, break, heal, drain and check; the report says what was found.

    What has not ended ``finish_s`` seconds after the last fault counts as lost.
    """
    random, started = Random(f"{seed}-{delivery}"), time.monotonic()
    kafka, s3_proxy = Brokers(directory, brokers), S3Proxy(s3_port, random)
    await s3_proxy.start()
    try:
        await kafka.start()
        own = {"NANOVLLM_ENGINE__BACKEND": backend, "NANOVLLM_DELIVERY": delivery}
        if backend == "native":
            own |= {"NANOVLLM_SAMPLING__MAX_TOKENS": "8", "OMP_NUM_THREADS": "1"}
        endpoint = {"NANOVLLM_S3__ENDPOINT_URL": f"http://127.0.0.1:{s3_proxy.port}"}
        world = World(kafka.bootstrap_servers, s3, directory, {**SETTINGS, **own, **endpoint})
        await world.create_topics(replicas=brokers)
        await create_topic(
            world.bootstrap_servers,
            world.topics.in_flight,
            replicas=brokers,
            settings={"cleanup.policy": "compact"},
        )
        async with Fleet(world, WORKERS, random) as fleet:
            drill = Drill(world, kafka, s3_proxy, fleet, random, says=backend == "echo")
            struck = await _produce_and_strike(drill, world, jobs, faults)
            exit_codes = await _finish(drill.ledger, world, fleet, finish_s)
            drill.ledger.late = kafka.late_commits(world.topics.results, world.topics.dead_letters)
            report = drill.ledger.check({0: await world.lag()})
            return {
                "seed": seed,
                "delivery": delivery,
                "broken_promises": broken_promises(report, delivery),
                **report,
                "culprits": [job for job, ends in drill.ledger.expected.items() if "crashed_worker" in ends.outcomes],
                "faults": dict(sorted(struck.items())),
                "s3_answers_spoiled": s3_proxy.spoiled,
                "worker_starts": fleet.starts,
                "worker_ends": {str(code): times for code, times in sorted(Counter(fleet.exit_codes).items())},
                "exit_codes_of_the_last_drain": exit_codes,
                "seconds": round(time.monotonic() - started, 1),
                "partitions": PARTITIONS,
                "brokers": brokers,
                "backend": backend,
            }
    finally:
        kafka.stop()
        s3_proxy.stop()


async def _produce_and_strike(drill: Drill, world: World, jobs: int, faults: int) -> Counter[str]:
    struck: Counter[str] = Counter()
    await drill.put_objects()
    async with AIOKafkaProducer(bootstrap_servers=world.bootstrap_servers, enable_idempotence=True) as producer:
        plan = drill.plan(faults)
        for number, kind in enumerate(plan):
            share = jobs * (number + 1) // len(plan) - jobs * number // len(plan)
            await asyncio.gather(drill.produce(producer, share), drill.faults[kind]())
            struck[kind] += 1
    return struck


async def _finish(ledger: Ledger, world: World, fleet: Fleet, finish_s: float) -> list[int | None]:
    """Read until every job has ended, end the workers, and read what they still said."""
    deadline = time.monotonic() + finish_s
    async with world.reader() as reader:

        async def read() -> int:
            outcomes = await reader.read()
            for outcome in outcomes:
                ledger.see(outcome)
            return len(outcomes)

        news = time.monotonic()
        while ledger.missing and time.monotonic() < deadline:
            if await read():
                news = time.monotonic()
            elif time.monotonic() - news > UNSTABLE_S and await world.lag() == 0:
                ledger.held_back = await world.held_back()
                break
        exit_codes = await fleet.drain()
        quiet = 0
        while quiet < 4:
            quiet = 0 if await read() else quiet + 1
    return exit_codes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--delivery", choices=["at_least_once", "exactly_once"], required=True)
    parser.add_argument("--brokers", type=int, default=1)
    parser.add_argument("--backend", choices=["echo", "native"], default="echo")
    parser.add_argument("--out", type=Path, default=Path("build/chaos"), help="a drill whose JSON is there is not run")
    options = parser.parse_args()
    kinds = [f"{options.brokers}-brokers"] * (options.brokers > 1) + [options.backend] * (options.backend != "echo")
    file = options.out / ("-".join([f"seed-{options.seed}-{options.delivery}", *kinds]) + ".json")
    if file.exists():
        print(f"{file} is there already")
        return 0
    with tempfile.TemporaryDirectory(prefix="nanovllm-chaos-") as temporary:
        directory = Path(temporary)
        store = VersityNode(directory / "s3")
        s3 = store.start()
        try:
            drill = run_drill(
                directory, s3, store.port, seed=options.seed, jobs=options.jobs, faults=options.faults,
                delivery=options.delivery, brokers=options.brokers, backend=options.backend,
            )  # fmt: skip
            report = asyncio.run(drill)
            if report["broken_promises"]:
                for log in directory.rglob("*.log"):
                    (options.out / "failed").mkdir(parents=True, exist_ok=True)
                    (options.out / "failed" / f"{file.stem}-{log.name}").write_bytes(log.read_bytes())
        finally:
            store.stop()
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 1 if report["broken_promises"] else 0


if __name__ == "__main__":
    sys.exit(main())
