"""SIGTERM and the probes in each phase of a worker's start, on the real process."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from parts import KafkaNode, create_topic, eventually, unique_name, worker_process

from nanovllm.demo.broker import EmbeddedBroker
from nanovllm.demo.child_process import LocalProcess, free_port

# Two seconds are promised. What is tested is that nothing is waited for that takes longer than this.
STOP_S = 15.0
ECHO = {"NANOVLLM_ENGINE__BACKEND": "echo"}


class Worker:
    """A worker process and its probes."""

    def __init__(self, directory: Path, bootstrap_servers: str, settings: dict[str, str], **process: object) -> None:
        self.topics = {name: unique_name(name) for name in ("jobs", "results", "metrics", "dead_letters")}
        self.group = unique_name("group")
        self._port = free_port()
        self._settings = {
            "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": bootstrap_servers,
            "NANOVLLM_KAFKA__GROUP_ID": self.group,
            **{f"NANOVLLM_TOPICS__{name.upper()}": topic for name, topic in self.topics.items()},
            "NANOVLLM_HTTP__PORT": str(self._port),
            **ECHO,
            **settings,
        }
        self.process: LocalProcess = worker_process(directory, settings=self._settings, **process)  # type: ignore[arg-type]

    def probe(self, path: str) -> tuple[int, list[str]]:
        """Status and reasons; 0 while nothing answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=10) as answer:
                return answer.status, json.loads(answer.read())["reasons"]
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())["reasons"]
        except OSError:
            return 0, []

    async def says(self, reason: str) -> None:
        """Return when /readyz gives ``reason``, and the process is said to be alive."""

        def is_said() -> bool:
            assert self.process.is_running, self.process.tail(30)
            return any(reason in said for said in self.probe("/readyz")[1])

        await eventually(is_said, why=f"never said {reason!r}")
        assert self.probe("/healthz") == (200, [])

    async def is_ready(self) -> None:
        await eventually(lambda: self.probe("/readyz") == (200, []), why=self.process.tail(30))

    async def stops(self, *, within_s: float = STOP_S) -> str:
        """SIGTERM; returns the log after an end in order."""
        self.process.terminate()
        await eventually(lambda: not self.process.is_running, within_s=within_s, why="SIGTERM was not heard")
        log = self.process.tail(10_000)
        assert self.process.exit_code == 0, log
        assert "Traceback" not in log
        return log


@contextmanager
def started(worker: Worker) -> Iterator[Worker]:
    worker.process.start()
    try:
        yield worker
    finally:
        worker.process.kill()


# Sends SIGTERM to itself as soon as the CLI imports anything that is not Python's own or this package's.
AT_THE_FIRST_IMPORT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root != "nanovllm" and root not in sys.stdlib_module_names:
            print("importing", root, "as", os.getpid(), flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            # PID 1 goes on here where there is no handler, anything else has ended.
            os._exit(3)

sys.meta_path.insert(0, Finder())
sys.argv = ["nanovllm", "worker"]
import nanovllm.cli.main
"""


def test_sigterm_is_heard_before_anything_heavy_is_imported() -> None:
    ended = subprocess.run([sys.executable, "-c", AT_THE_FIRST_IMPORT], capture_output=True, text=True)
    assert "importing" in ended.stdout, ended.stderr
    assert ended.returncode == 0


def test_sigterm_is_heard_by_pid_1_before_anything_heavy_is_imported() -> None:
    alone = ["unshare", "--pid", "--fork", "--kill-child"]
    try:
        subprocess.run([*alone, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("unshare may not make a PID namespace here")
    ended = subprocess.run([*alone, sys.executable, "-c", AT_THE_FIRST_IMPORT], capture_output=True, text=True)
    assert "as 1\n" in ended.stdout, ended.stderr
    assert ended.returncode == 0


def test_other_commands_end_by_sigterm_as_programs_do() -> None:
    program = AT_THE_FIRST_IMPORT.replace('"worker"', '"doctor"')
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGTERM


async def test_sigterm_while_the_model_loads_ends_the_process(tmp_path: Path, embedded_broker: str) -> None:
    worker = Worker(tmp_path, embedded_broker, {"NANOVLLM_ENGINE__BACKEND": "native"})
    await create_topic(embedded_broker, *worker.topics.values())
    with started(worker):
        await eventually(lambda: "loading the model" in worker.process.tail(100), why=worker.process.tail(30))
        await worker.stops()


@pytest.fixture
async def silent_broker() -> AsyncIterator[str]:
    """Takes connections and answers nothing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65_536):
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


# The limit of 30 s, lowered: the probe must not call a loop dead that merely waits.
IMPATIENT = """
import sys
from nanovllm.cli import main as cli
from nanovllm.pipeline.operations import health

health.MAX_SILENCE_S = 8.0
sys.argv[0] = "nanovllm"
sys.exit(cli.main())
"""


async def test_a_worker_whose_brokers_do_not_answer_is_alive_says_so_and_hears_sigterm(
    tmp_path: Path, silent_broker: str
) -> None:
    worker = Worker(tmp_path, silent_broker, {}, program=("-c", IMPATIENT))
    with started(worker):
        await worker.says("waiting for the brokers")
        waiting_since = time.monotonic()
        while time.monotonic() - waiting_since < 12:
            assert (await asyncio.to_thread(worker.probe, "/healthz")) == (200, [])
            await asyncio.sleep(0.5)
        await worker.stops()


@pytest.mark.kafka
@pytest.mark.parametrize("mode", ["at_least_once", pytest.param("exactly_once", marks=pytest.mark.slow)])
async def test_a_listener_that_does_not_resolve_is_named_and_asked_for_with_pauses(tmp_path: Path, mode: str) -> None:
    advertised = {"advertised.listeners": "PLAINTEXT://kafka-0.nowhere.invalid:{port}"}
    async with KafkaNode(tmp_path / "node", settings=advertised) as node:
        worker = Worker(tmp_path, node.bootstrap_servers, {"NANOVLLM_DELIVERY": mode}, program=("-c", IMPATIENT))
        with started(worker):
            await worker.says("waiting for the brokers")
            waiting_since = time.monotonic()
            while time.monotonic() - waiting_since < 10:
                assert (await asyncio.to_thread(worker.probe, "/healthz")) == (200, [])
                await asyncio.sleep(0.5)
            log = await worker.stops()
    assert f"no broker answers at kafka-0.nowhere.invalid:{node.port}" in log
    assert "advertised.listeners" in log
    assert len(log.splitlines()) < 60


async def test_a_broker_that_is_down_at_the_start_is_named_and_waited_for(tmp_path: Path) -> None:
    broker = EmbeddedBroker(port=free_port())
    nobody = broker.bootstrap_servers
    worker = Worker(tmp_path, nobody, {})
    with started(worker):
        await worker.says(f"waiting for the brokers {nobody}")
        await eventually(lambda: f"no broker answers at {nobody}" in worker.process.tail(100))
        assert len(worker.process.tail(1_000).splitlines()) < 20
        await broker.start()
        try:
            await create_topic(nobody, *worker.topics.values())
            await worker.is_ready()
            await worker.stops()
        finally:
            broker.stop()


async def test_brokers_that_never_answer_are_waited_for(tmp_path: Path, silent_broker: str) -> None:
    worker = Worker(tmp_path, silent_broker, {"NANOVLLM_KAFKA__REQUEST_TIMEOUT_MS": "1000"})
    with started(worker):
        await eventually(lambda: worker.process.tail(1_000).count("waiting for the brokers") >= 2)
        await worker.says("waiting for the brokers")
        assert silent_broker in worker.process.tail(30)
        await worker.stops()


@pytest.mark.kafka
async def test_a_topic_that_is_missing_ends_the_worker_before_it_joins_the_group(tmp_path: Path) -> None:
    # Kafka's default: the worker's own look must not make the topic.
    async with KafkaNode(tmp_path / "node", settings={"auto.create.topics.enable": "true"}) as node:
        for missing in ("jobs", "dead_letters"):
            worker = Worker(tmp_path / missing, node.bootstrap_servers, {})
            there = [topic for name, topic in worker.topics.items() if name != missing]
            await create_topic(node.bootstrap_servers, *there)
            with started(worker):
                await eventually(lambda process=worker.process: not process.is_running)
            log = worker.process.tail(1_000)
            assert worker.process.exit_code == 2, log
            assert f"do not list topic {worker.topics[missing]}" in log
            assert log.count("not found in cluster metadata") < 10
            assert "consuming" not in log
            assert "Traceback" not in log


# A model that takes minutes: its thread is in the midst of torch when the brokers have said what is wrong.
SLOW_TO_LOAD = """
import sys
import torch
from nanovllm.cli import main as cli
from nanovllm.pipeline import build

def load(options):
    while True:
        torch.randn(300, 300) @ torch.randn(300, 300)

build.build_engine = load
sys.argv[0] = "nanovllm"
sys.exit(cli.main())
"""


@pytest.mark.kafka
async def test_a_topic_that_is_missing_ends_the_worker_while_its_model_loads(tmp_path: Path) -> None:
    async with KafkaNode(tmp_path / "node") as node:
        engine = {"NANOVLLM_ENGINE__BACKEND": "native"}
        worker = Worker(tmp_path, node.bootstrap_servers, engine, program=("-c", SLOW_TO_LOAD))
        with started(worker):
            await eventually(lambda: not worker.process.is_running)
    log = worker.process.tail(1_000)
    assert "loading the model" in log
    assert worker.process.exit_code == 2, log
    assert "do not list topics" in log
    assert "Traceback" not in log


class _Draining(ConsumerRebalanceListener):
    """Another member, which lets the group wait for it."""

    def __init__(self) -> None:
        self.ends = asyncio.Event()

    async def on_partitions_revoked(self, revoked: object) -> None:
        if revoked:
            await self.ends.wait()

    def on_partitions_assigned(self, assigned: object) -> None:
        pass


@pytest.mark.kafka
async def test_sigterm_while_the_group_waits_for_another_member_leaves_the_group(
    kafka_broker: str, tmp_path: Path
) -> None:
    worker = Worker(tmp_path, kafka_broker, {})
    await create_topic(kafka_broker, *worker.topics.values(), partitions=2)
    draining = _Draining()
    async with AIOKafkaConsumer(
        bootstrap_servers=kafka_broker,
        group_id=worker.group,
        enable_auto_commit=False,
        heartbeat_interval_ms=300,
        partition_assignment_strategy=(StickyPartitionAssignor,),
        rebalance_timeout_ms=120_000,
    ) as other:
        other.subscribe([worker.topics["jobs"]], listener=draining)
        await eventually(lambda: len(other.assignment()) == 2)
        with started(worker):
            await worker.says(f"waiting for partitions from group {worker.group}")
            assert await _members(kafka_broker, worker.group) == 2
            await worker.stops()
            # The other one still drains: without LeaveGroup the worker would be a member until its session ends.
            assert await _members(kafka_broker, worker.group) == 1
        draining.ends.set()


async def _members(bootstrap_servers: str, group: str) -> int:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    await admin.start()
    try:
        coordinator = await admin.find_coordinator(group)
        (answer,) = await admin.describe_consumer_groups([group], group_coordinator_id=coordinator)
        return len(answer.groups[0][5])
    finally:
        await admin.close()


@pytest.mark.kafka
@pytest.mark.parametrize("fault", ["none", "down", "silent"])
@pytest.mark.parametrize("mode", ["at_least_once", pytest.param("exactly_once", marks=pytest.mark.slow)])
async def test_sigterm_before_the_first_job_ends_the_worker_also_while_the_broker_is_away(
    tmp_path: Path, mode: str, fault: str
) -> None:
    async with KafkaNode(tmp_path / "node") as node:
        worker = Worker(tmp_path, node.bootstrap_servers, {"NANOVLLM_DELIVERY": mode})
        await create_topic(node.bootstrap_servers, *worker.topics.values())
        with started(worker):
            await worker.is_ready()
            with _away(node, fault):
                if fault != "none":
                    await asyncio.sleep(2)  # the clients notice
                    assert worker.probe("/healthz") == (200, [])
                if fault == "down":
                    await worker.says(f"the consumer group is not joined at the brokers {node.bootstrap_servers}")
                await worker.stops()


@pytest.mark.kafka
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["down", "silent"])
@pytest.mark.parametrize("mode", ["at_least_once", "exactly_once"])
async def test_sigterm_while_the_broker_is_away_and_results_wait_for_it_ends_the_worker_in_order(
    tmp_path: Path, mode: str, fault: str
) -> None:
    settings = {"NANOVLLM_DELIVERY": mode, "NANOVLLM_ADMISSION__DRAIN_TIMEOUT_S": "1"}
    async with KafkaNode(tmp_path / "node") as node:
        worker = Worker(tmp_path, node.bootstrap_servers, settings)
        await create_topic(node.bootstrap_servers, *worker.topics.values())
        with started(worker):
            await worker.is_ready()
            async with AIOKafkaProducer(bootstrap_servers=node.bootstrap_servers) as producer:
                for number in range(3_000):
                    job = json.dumps({"job_id": f"j{number}", "prompt": "p"}).encode()
                    await producer.send(worker.topics["jobs"], job)
            with _away(node, fault):
                await asyncio.sleep(1)
                log = await worker.stops(within_s=60)
    assert "go back to Kafka" in log


@contextmanager
def _away(node: KafkaNode, fault: str) -> Iterator[None]:
    if fault == "down":
        node.kill()
    with node.silent() if fault == "silent" else nullcontext():
        yield
