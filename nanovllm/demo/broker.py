"""The embedded broker: a small program that speaks Kafka, for the demo and the default tests.

It is the binary inside the package ``noida-db`` (extras ``demo`` and ``dev``): groups, idempotence, transactions,
fencing and read_committed work with aiokafka. Its limits:

- it writes its snapshots behind the traffic, so a crash of the broker loses the last second;
- it never enforces session timeouts: a killed member keeps its partitions, and no other one gets them, until a member
  leaves the group in its name or the broker restarts; it ignores ``transaction_timeout_ms``;
- a second member that joins a running group may wait for its partitions for minutes: one worker a group;
- offset commits during a rebalance fail;
- it knows no TLS and no SCRAM.
"""

from __future__ import annotations

import asyncio
import contextlib
from importlib import resources
from pathlib import Path

from aiokafka import AIOKafkaClient
from aiokafka.errors import KafkaError

from nanovllm.demo.child_process import HOST, LocalServer
from nanovllm.errors import ConfigurationError


class EmbeddedBroker(LocalServer):
    """A Kafka broker on loopback; started again on the same ``directory``, it finds its topics."""

    def __init__(self, directory: Path | None = None, *, port: int | None = None) -> None:
        super().__init__("embedded broker", directory, port)

    @property
    def bootstrap_servers(self) -> str:
        """``host:port`` for every Kafka client."""
        return f"{HOST}:{self._port}"

    def command(self) -> list[str]:
        """The program inside the package, whose console script is only a Python process that waits for it."""
        try:
            program = Path(str(resources.files("noida_db").joinpath("noida-db")))
        except ModuleNotFoundError as error:
            raise ConfigurationError("the embedded broker needs noida-db: pip install '.[demo]' in a clone") from error
        if not program.is_file():
            raise ConfigurationError("the installed noida-db has no program for this platform")
        with contextlib.suppress(PermissionError):
            program.chmod(0o755)
        data = self._directory / "data"
        listen = ["--host", HOST, "--kafka-port", str(self._port)]
        return [str(program), "start", "--only", "kafka", *listen, "--data-dir", str(data)]

    async def answers(self) -> bool:
        """Whether it answers a Metadata request now."""
        return await answers_metadata(self.bootstrap_servers)


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
