"""The embedded broker: one small program that speaks Kafka on loopback, for the demo and the default tests.

It is the binary inside the package ``noida-db`` (extras ``demo`` and ``dev``): groups, idempotence, transactions,
fencing and read_committed work with aiokafka. It is no place for anybody's data, and its limits matter:

- it writes its snapshots behind the traffic, so a crash of the broker loses the last second;
- it never enforces session timeouts: a killed member keeps its partitions, and no other one gets them, until a member
  leaves the group in its name (``evict_members``) or the broker restarts; it ignores ``transaction_timeout_ms``;
- offset commits during a rebalance fail;
- it knows no TLS and no SCRAM.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
from importlib import resources
from pathlib import Path

from aiokafka import AIOKafkaClient
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, for_code
from aiokafka.protocol.group import LeaveGroupRequest

from nanovllm.demo.child_process import LocalProcess, free_port
from nanovllm.errors import ConfigurationError, SystemicError

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"


def broker_program() -> Path:
    """The program inside the package ``noida-db``. Its console script is only a Python process that waits for it.

    Raises:
        ConfigurationError: the package is not installed, or holds no program for this platform.
    """
    try:
        program = Path(str(resources.files("noida_db").joinpath("noida-db")))
    except ModuleNotFoundError as error:
        raise ConfigurationError("the embedded broker needs noida-db: pip install '.[demo]' in a clone") from error
    if not program.is_file():
        raise ConfigurationError("the installed noida-db has no program for this platform")
    with contextlib.suppress(PermissionError):
        program.chmod(0o755)
    return program


class EmbeddedBroker:
    """A Kafka broker on loopback for as long as the object is started.

    ``directory`` keeps its data (a broker started again on it finds its topics); None: a temporary one, removed by
    ``stop()``. ``port`` is taken from what is free when None.
    """

    def __init__(self, directory: Path | None = None, *, port: int | None = None) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="nanovllm-broker-") if directory is None else None
        self._directory = directory or Path(self._temporary.name if self._temporary else "")
        self._wanted_port = port
        self._port = port
        self._process: LocalProcess | None = None

    @property
    def bootstrap_servers(self) -> str:
        """``host:port`` for every Kafka client."""
        return f"{HOST}:{self._port}"

    @property
    def pid(self) -> int | None:
        """Process id of the broker, None before the start."""
        return self._process.pid if self._process else None

    async def start(self, timeout_s: float = 30.0) -> None:
        """Start it and return when it answers a Metadata request (its port is open earlier).

        Raises:
            ConfigurationError: noida-db is not installed.
            SystemicError: it ended by itself, or does not answer within ``timeout_s``.
        """
        program = broker_program()
        deadline = time.monotonic() + timeout_s
        for attempts_left in (2, 1, 0):
            self._port = self._wanted_port or free_port(HOST)
            command = [str(program), "start", "--only", "kafka", "--host", HOST, "--kafka-port", str(self._port)]
            command += ["--data-dir", str(self._directory / "data")]
            self._process = LocalProcess("embedded broker", command, self._directory / "broker.log")
            self._process.start()
            while self._process.is_running:
                if await answers_metadata(self.bootstrap_servers):
                    return
                if time.monotonic() > deadline:
                    self.stop()
                    raise SystemicError(f"the embedded broker did not answer within {timeout_s:g} s")
                await asyncio.sleep(0.05)
            # Between free_port() and the broker's own bind, another process may have taken the port.
            if self._wanted_port or not attempts_left:
                break
        tail = self._process.tail() if self._process else ""
        raise SystemicError(f"the embedded broker ended while starting; its last words: {tail or 'none'}")

    def kill(self) -> None:
        """End it as a crash would; the last second of what was sent to it is lost."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """End it, and remove its temporary directory. Does nothing when it is not running."""
        if self._process is not None:
            self._process.stop()
        if self._temporary is not None:
            self._temporary.cleanup()

    async def __aenter__(self) -> EmbeddedBroker:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()


async def answers_metadata(bootstrap_servers: str) -> bool:
    """Whether a broker there answers a Metadata request now; an open port says less."""
    host, _, port = bootstrap_servers.partition(":")
    try:
        # aiokafka logs an error for every refused connection; a plain connection first keeps the log clean.
        _, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    writer.close()
    client = AIOKafkaClient(bootstrap_servers=bootstrap_servers, request_timeout_ms=2_000)
    try:
        await client.bootstrap()
        return bool(client.cluster.brokers())
    except (KafkaError, OSError):
        return False
    finally:
        await client.close()


async def evict_members(bootstrap_servers: str, group_id: str) -> list[str]:
    """Leave the group in the name of each of its members; returns their ids.

    What a real broker's session timeout does for a member that died: its partitions become free. Use it only when
    every member of the group is known to be dead; a living one is thrown out as well and must join again.
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
            request = LeaveGroupRequest(group_id, member)
            response = await admin._client.send(
                coordinator, request
            )  # aiokafka's admin client has no public call for it
            if response.error_code:
                raise for_code(response.error_code)(f"LeaveGroup for {member}")
        return members
    finally:
        await admin.close()
