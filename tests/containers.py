"""Containers of the real parts, by testcontainers: pinned images, on the host's network, as the user of the tests.

On the host's network a part listens on the port of loopback that its test chose and finds other parts there, as a local
program does; it takes Docker Engine on Linux. Folders are mounted under their own paths.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

IMAGES: Mapping[str, str] = {
    "kafka": "apache/kafka:4.3.1@sha256:77e3df9054047a88b520d0cc46e16696d3b22022e1d580aeccd2632df6532837",
    "versity": "versity/versitygw:v1.8.0@sha256:30292fc2eeacc67a36993b01f7a7a5e3361a19cced0e80c1d71cfa2a4b0a2499",
    "minio": (
        "minio/minio:RELEASE.2025-09-07T16-13-09Z"
        "@sha256:14cea493d9a34af32f524e538b8346cf79f3321eff8e708c1e2960462bd8936e"
    ),
    "toxiproxy": (
        "ghcr.io/shopify/toxiproxy:2.12.0@sha256:9378ed52a28bc50edc1350f936f518f31fa95f0d15917d6eb40b8e376d1a214e"
    ),
    "k3s": "rancher/k3s:v1.35.5-k3s1@sha256:2074403abe1bded11ef3dde09d457e13be8e0b64c218b1c4f8269b4565cfbc65",
    "keda": "ghcr.io/kedacore/keda:2.20.2@sha256:fe74c7b8849586a67ad2201bcb89e7f5ac221ff90399ecaa8fd28427f1ef11e6",
    "keda-adapter": (
        "ghcr.io/kedacore/keda-metrics-apiserver:2.20.2"
        "@sha256:27286536a8a775aeeee37a7e343f8ecebb27ebf680ee1181a4f99e82eefb253b"
    ),
}
"""By part: tag, and digest of the index of all architectures."""


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


def require_docker(part: str, elsewhere: str) -> None:
    """Skip the test where no Docker daemon answers; ``elsewhere`` says where ``part`` is looked for before."""
    if not docker_answers():
        pytest.skip(f"{part}: {elsewhere}, and no Docker daemon answers")


class ContainerProcess:
    """A container with the interface of `LocalProcess`; each start makes a new one, and its end removes it.

    ``command`` is what the image's entrypoint, or ``entrypoint`` in its place, is given; ``writes`` is a folder of the
    host that it may change, ``reads`` are files and folders that it may not.
    """

    def __init__(
        self,
        part: str,
        command: Sequence[str],
        *,
        entrypoint: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        writes: Path | None = None,
        reads: Iterable[Path] = (),
    ) -> None:
        self.part = part
        self._command = list(command)
        self._entrypoint = list(entrypoint) if entrypoint is not None else None
        self._env = dict(env or {})
        self._writes = writes
        self._reads = tuple(reads)
        self._container: DockerContainer | None = None
        self._last_words = ""

    def configured(self, **docker_client: Any) -> DockerContainer:
        """The container, not started; ``docker_client`` are arguments of docker-py's client."""
        from testcontainers.core.container import DockerContainer

        container = DockerContainer(IMAGES[self.part], docker_client_kw=docker_client).with_command(self._command)
        # `network`, not `network_mode`: beside the second, testcontainers may name a network of its own.
        options: dict[str, Any] = {"network": "host", "user": f"{os.getuid()}:{os.getgid()}"}
        if self._entrypoint is not None:
            options["entrypoint"] = self._entrypoint
        container.with_kwargs(**options).with_envs(**self._env)
        for path in self._reads:
            container.with_volume_mapping(path, str(path), "ro")
        if self._writes is not None:
            container.with_volume_mapping(self._writes, str(self._writes), "rw")
        return container

    def start(self) -> None:
        """Start it. Raises DockerException where the image cannot be pulled, or the daemon refuses."""
        if self._writes is not None:
            self._writes.mkdir(parents=True, exist_ok=True)  # Docker would make it, as root
        self._container = self.configured()
        self._container.start()

    @property
    def is_running(self) -> bool:
        if self._container is None:
            return False
        self._container.reload()
        return self._container.status in ("created", "running", "paused")

    @property
    def exit_code(self) -> int | None:
        if self._container is None or self.is_running:
            return None
        return self._container.wait()

    def tail(self, lines: int = 10) -> str:
        """The last lines of its output."""
        if self._container is not None:
            self._last_words = self._container.get_wrapped_container().logs().decode(errors="replace")
        return "\n".join(self._last_words.splitlines()[-lines:])

    def pause(self) -> None:
        """Stop the clock of its processes: connections stay open, and nothing answers."""
        assert self._container is not None
        self._container.get_wrapped_container().pause()

    def resume(self) -> None:
        assert self._container is not None
        self._container.get_wrapped_container().unpause()

    def stop(self, grace_s: float = 10.0) -> None:
        """SIGTERM, then SIGKILL after ``grace_s`` seconds."""
        if self._container is not None:
            self._container.get_wrapped_container().stop(timeout=round(grace_s))
        self.kill()

    def kill(self) -> None:
        """SIGKILL, as in a crash; what it wrote stays."""
        if self._container is not None:
            self.tail()
            self._container.stop()
            self._container = None


_CLUSTER = "bmFub3ZsbG0tdGVzdC0wMQ"
_LISTENERS = "PLAINTEXT", "SASL_PLAINTEXT", "SSL", "SASL_SSL"


def broker_properties(
    data: Path, port: int, controller_port: int, *, node_id: int = 1, voters: str = ""
) -> dict[str, str]:
    """Properties of one Apache Kafka node that is broker and controller; ``voters`` names the nodes of a cluster."""
    voters = voters or f"{node_id}@127.0.0.1:{controller_port}"
    nodes = len(voters.split(","))
    copies, in_sync = str(min(nodes, 3)), "2" if nodes > 2 else "1"
    return {
        "process.roles": "broker,controller",
        "node.id": str(node_id),
        "controller.quorum.voters": voters,
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
        "listener.security.protocol.map": ",".join(["CONTROLLER:PLAINTEXT", *(f"{one}:{one}" for one in _LISTENERS)]),
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "log.dirs": str(data),
        "num.partitions": "4",
        "default.replication.factor": copies,
        "min.insync.replicas": in_sync,
        "offsets.topic.num.partitions": "4",
        "offsets.topic.replication.factor": copies,
        "transaction.state.log.num.partitions": "4",
        "transaction.state.log.replication.factor": copies,
        "transaction.state.log.min.isr": in_sync,
        # A test waits for a rebalance, a lost member and a lost broker in seconds.
        "group.initial.rebalance.delay.ms": "0",
        "group.min.session.timeout.ms": "500",
        "broker.heartbeat.interval.ms": "400",
        "broker.session.timeout.ms": "2000",
        # The default would be allocated at the start.
        "log.cleaner.dedupe.buffer.size": "8388608",
    }


def kafka_process(folder: Path, properties: Mapping[str, str], scram: Mapping[str, str]) -> ContainerProcess:
    """An Apache Kafka node in ``folder``, which is formatted at the first start; ``scram``: users and passwords.

    Files that ``properties`` name, as keystores, are mounted.
    """
    file = folder / "server.properties"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
    users = [
        word
        for user, password in scram.items()
        for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
        for word in ("--add-scram", f"{mechanism}=[name={user},password={password}]")
    ]
    java = ["java", "-cp", "/opt/kafka/libs/*", "-Xmx384m", "-XX:+UseSerialGC", "-Dlog4j2.level=WARN"]
    storage = [*java, "kafka.tools.StorageTool", "format", "--ignore-formatted", "-t", _CLUSTER, "-c", str(file)]
    script = f"{shlex.join([*storage, *users])}\nexec {shlex.join([*java, 'kafka.Kafka', str(file)])}"
    named = [Path(value) for value in properties.values() if value.startswith("/")]
    files = sorted({path for path in named if path.is_file()})
    return ContainerProcess("kafka", ["-ec", script], entrypoint=["sh"], writes=folder, reads=files)


def versity_process(
    folder: Path, port: int, keys: tuple[str, str], notifies: tuple[str, str] | None
) -> ContainerProcess:
    """Versity's S3 gateway over ``folder``; ``notifies``: the broker and the topic of its buckets' notifications."""
    for name in ("buckets", "versions", "meta", "iam"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    command = ["--port", f"127.0.0.1:{port}", "--iam-dir", str(folder / "iam"), "--health", "/healthz", "--keep-alive"]
    if notifies is not None:
        command += ["--event-kafka-url", notifies[0], "--event-kafka-topic", notifies[1]]
    command += ["--quiet", "posix", "--versioning-dir", str(folder / "versions")]
    command += ["--sidecar", str(folder / "meta"), str(folder / "buckets")]
    env = {"ROOT_ACCESS_KEY": keys[0], "ROOT_SECRET_KEY": keys[1]}
    return ContainerProcess("versity", command, env=env, writes=folder)
