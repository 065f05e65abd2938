"""Real parts for the tests: Kafka brokers, S3 servers, and where they come from on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from uuid import uuid4

import boto3
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import for_code
from aiokafka.protocol.group import LeaveGroupRequest
from botocore.config import Config
from PIL import Image

from nanovllm.demo.broker import answers_metadata
from nanovllm.demo.child_process import LocalProcess, free_port

REPOSITORY = Path(__file__).resolve().parent.parent


def unique_name(prefix: str = "t") -> str:
    """A name that no other test uses, fit for topics, groups and buckets."""
    return f"{prefix}-{uuid4().hex[:10]}"


async def eventually(is_true: Callable[[], object], *, within_s: float = 60.0, why: str = "") -> None:
    """Return as soon as ``is_true()`` is; AssertionError after ``within_s`` seconds, which only a fault should take."""
    deadline = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < deadline, why or "what was waited for never came"
        await asyncio.sleep(0.02)


def program_of(variable: str, default: Path) -> Path | None:
    """The program that an environment variable names, or ``default``; None where there is none."""
    program = Path(os.environ.get(variable) or default)
    return program if os.access(program, os.X_OK) else None


def kafka_node_program() -> Path | None:
    """The program that runs one Apache Kafka node: ``KAFKA_NODE``, or the one beside the repository."""
    return program_of("KAFKA_NODE", REPOSITORY.parent / "shared" / "kafka" / "kafka-node")


def s3_node_program() -> Path | None:
    """The program that runs a real S3 server: ``S3_NODE``, or the one beside the repository."""
    return program_of("S3_NODE", REPOSITORY.parent / "shared" / "s3" / "s3-node")


@cache
def docker_answers() -> bool:
    """Whether a Docker daemon answers here."""
    import docker
    from docker.errors import DockerException

    try:
        client = docker.from_env(timeout=5)
    except DockerException:
        return False
    with contextlib.closing(client):
        try:
            return bool(client.ping())
        except DockerException:
            return False


class KafkaNode:
    """One Apache Kafka node on loopback, on its own directory: start, stop, kill, start again.

    ``settings`` are broker properties that win over the node's own (``{port}`` in a value is replaced by the node's
    port, ``{controller_port}`` by its controller's), ``scram`` user names with their passwords.
    ``probe`` False skips the wait for a plaintext Metadata answer: a listener with TLS or a login gives none.
    ``cluster`` numbers the node among others; see ``kafka_cluster``.
    """

    def __init__(
        self,
        directory: Path,
        *,
        settings: Mapping[str, str] | None = None,
        scram: Mapping[str, str] | None = None,
        probe: bool = True,
    ) -> None:
        self.directory = directory
        self.port = free_port()
        self.controller_port = free_port()
        self.cluster: tuple[str, ...] = ()
        self._settings = dict(settings or {})
        self._scram = dict(scram or {})
        self._probe = probe
        self._process: LocalProcess | None = None

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def data(self) -> Path:
        """Where the node keeps its logs."""
        return self.directory / "node" / "data"

    async def start(self, timeout_s: float = 90.0) -> None:
        program = kafka_node_program()
        assert program is not None, "ask kafka_node_program() first"
        command = [str(program), "--dir", str(self.directory / "node"), "--port", str(self.port)]
        command += ["--controller-port", str(self.controller_port), *self.cluster]
        for name, value in self._settings.items():
            text = value.replace("{port}", str(self.port)).replace("{controller_port}", str(self.controller_port))
            command += ["--set", f"{name}={text}"]
        for user, password in self._scram.items():
            command += ["--scram", f"{user}:{password}"]
        self._process = LocalProcess("kafka", command, self.directory / "kafka.log")
        self._process.start()
        deadline = time.monotonic() + timeout_s
        while not await (answers_metadata(self.bootstrap_servers) if self._probe else self._is_open()):
            if not self._process.is_running:
                raise RuntimeError(f"kafka ended with {self._process.exit_code}: {self._process.tail(20)}")
            if time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"kafka did not answer within {timeout_s:g} s: {self._process.tail(20)}")
            await asyncio.sleep(0.1)

    async def _is_open(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        return True

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop(grace_s=20)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    async def __aenter__(self) -> KafkaNode:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()


def kafka_cluster(nodes: Sequence[KafkaNode]) -> None:
    """Make nodes that were not started yet one cluster; then start them together, for none is ready alone."""
    voters = ",".join(f"{number}@127.0.0.1:{node.controller_port}" for number, node in enumerate(nodes, 1))
    for number, node in enumerate(nodes, 1):
        node.cluster = ("--node-id", str(number), "--voters", voters)


async def create_topic(
    bootstrap_servers: str,
    *names: str,
    partitions: int = 4,
    replicas: int = 1,
    settings: Mapping[str, str] | None = None,
) -> None:
    """Create topics and return when the broker lists all of their partitions."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    await admin.start()
    try:
        topics = [NewTopic(name, partitions, replicas, topic_configs=dict(settings or {})) for name in names]
        response = await admin.create_topics(topics)
        for topic, code, *rest in response.topic_errors:
            assert code == 0, f"create {topic}: error {code} {rest}"
        for _ in range(1_200):
            described = await admin.describe_topics(list(names))
            if all(len(topic["partitions"]) == partitions for topic in described):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{names} did not get {partitions} partitions")
    finally:
        await admin.close()


async def evict_members(bootstrap_servers: str, group_id: str) -> list[str]:
    """Leave the group in the name of each of its members; returns their ids.

    What a real broker's session timeout does for a member that died, and the embedded broker does not. Use it only
    when every member of the group is known to be dead; a living one is thrown out as well and must join again.
    """
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    await admin.start()
    try:
        coordinator = await admin.find_coordinator(group_id)
        members: list[str] = []
        for response in await admin.describe_consumer_groups([group_id], group_coordinator_id=coordinator):
            for group in response.to_object()["groups"]:
                members += [member["member_id"] for member in group["members"]]
        for member in members:
            # aiokafka's admin client has no public call for it.
            response = await admin._client.send(coordinator, LeaveGroupRequest(group_id, member))
            if response.error_code:
                raise for_code(response.error_code)(f"LeaveGroup for {member}")
        return members
    finally:
        await admin.close()


@dataclass
class S3Part:
    """An S3 server with a client and buckets of this test's own."""

    endpoint_url: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"
    client: Any = field(init=False)

    def __post_init__(self) -> None:
        self.client = boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            config=Config(signature_version="s3v4", s3={"addressing_style": "path"}, retries={"max_attempts": 2}),
        )

    @property
    def environment(self) -> dict[str, str]:
        """The AWS SDK's variables for whatever process shall use this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, *, versioned: bool = False) -> str:
        name = unique_name("bucket")
        self.client.create_bucket(Bucket=name)
        if versioned:
            self.client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        return name

    def put(self, bucket: str, key: str, body: bytes) -> str:
        """Store an object; returns its ``s3://`` URI."""
        self.client.put_object(Bucket=bucket, Key=key, Body=body)
        return f"s3://{bucket}/{key}"


Fault = Literal["refuse", "cut", "unavailable", "forbidden"]

_STATUS_LINES: Mapping[str | None, bytes] = {
    "unavailable": b"HTTP/1.1 503 Slow Down",
    "forbidden": b"HTTP/1.1 403 Forbidden",
}


class FaultProxy:
    """Stands before an HTTP server and spoils connections in their order; once ``faults`` are used up, none.

    None spoils nothing of one request, which gets a connection of its own.
    ``refuse`` closes at once, ``cut`` in the middle of the answer's first bytes, ``unavailable`` answers 503,
    ``forbidden`` 403.
    """

    def __init__(self, upstream_url: str, faults: Iterable[Fault | None]) -> None:
        upstream = urlsplit(upstream_url)
        self._upstream = (upstream.hostname or "", upstream.port or 80)
        self._faults = list(faults)
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def faults_left(self) -> int:
        return len(self._faults)

    def heal(self) -> None:
        """Spoil nothing any more."""
        self._faults.clear()

    async def __aenter__(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_single = bool(self._faults)
        fault = self._faults.pop(0) if self._faults else None
        try:
            if fault == "refuse":
                return
            if fault in _STATUS_LINES:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(_STATUS_LINES[fault] + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                await writer.drain()
                return
            up_reader, up_writer = await asyncio.open_connection(*self._upstream)
            try:
                if is_single:
                    up_writer.write(await reader.readuntil(b"\r\n") + b"Connection: close\r\n")
                forth = asyncio.create_task(_pump(reader, up_writer))
                await _pump(up_reader, writer, at_most=300 if fault == "cut" else None)
                forth.cancel()
            finally:
                up_writer.close()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, at_most: int | None = None) -> None:
    while data := await reader.read(at_most or 65_536):
        writer.write(data)
        await writer.drain()
        if at_most is not None:
            return


def png(colour: tuple[int, int, int], size: tuple[int, int] = (64, 48)) -> bytes:
    """A picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


class VersityNode:
    """A real S3 server (Versity S3 Gateway) on its own directory; ``more`` are further options of ``s3-node``."""

    def __init__(self, directory: Path, *, more: Iterable[str] = ()) -> None:
        self.directory = directory
        self.port = free_port()
        self._more = list(more)
        self._process: LocalProcess | None = None

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, timeout_s: float = 60.0) -> S3Part:
        program = s3_node_program()
        assert program is not None, "ask s3_node_program() first"
        command = [str(program), "--dir", str(self.directory / "node"), "--port", str(self.port), *self._more]
        self._process = LocalProcess("s3", command, self.directory / "s3.log")
        self._process.start()
        deadline = time.monotonic() + timeout_s
        while not self._is_up():
            if not self._process.is_running or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the S3 server does not answer: {self._process.tail(20)}")
            time.sleep(0.05)
        return S3Part(self.endpoint_url, "test", "testsecret")

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint_url}/healthz", timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return False
        except OSError:
            return False

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()


def python_process(
    directory: Path, *command: str, settings: Mapping[str, str], name: str, python: str | Path = sys.executable
) -> LocalProcess:
    """A process of ``python``, by default this one, not started yet; its log is in ``directory``.

    ``settings`` are environment variables; see ``process_environment``.
    """
    env = process_environment({"PYTHONUNBUFFERED": "1", **settings})
    return LocalProcess(name, [str(python), *command], directory / f"{name}.log", env=env)


def process_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without variables of ours and of the AWS SDK's, and ``settings`` over it."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("NANOVLLM_", "AWS_"))}
    return inherited | dict(settings)


def worker_process(
    directory: Path,
    *options: str,
    settings: Mapping[str, str],
    name: str = "worker",
    program: Sequence[str] = ("-m", "nanovllm.cli.main"),
    python: str | Path = sys.executable,
) -> LocalProcess:
    """``nanovllm worker`` as a `python_process`."""
    own = {"NANOVLLM_HTTP__HOST": "127.0.0.1", "NANOVLLM_HTTP__PORT": "0"}
    return python_process(
        directory, *program, "worker", *options, settings=own | dict(settings), name=name, python=python
    )
