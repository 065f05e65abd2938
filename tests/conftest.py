"""Fixtures for real parts. Whatever a machine lacks skips the test, with the reason, or fails it (REQUIRE_PARTS)."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import own_cache
import pytest
import skips
from parts import KafkaNode, MinioNode, S3Part, VersityNode, unique_name

from nanovllm.demo.broker import EmbeddedBroker

# The tests see neither the shell's settings and credentials, nor those of ~/.aws, nor a proxy before loopback; and what
# they print is plain, though Rich and Typer are asked for colours (GitHub's runners do).
_TERMINAL = ("COLUMNS", "FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS", "GITHUB_ACTIONS")
for _name in [name for name in os.environ if name.startswith(("NANOVLLM_", "AWS_")) or name in _TERMINAL]:
    del os.environ[_name]
os.environ |= dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
os.environ |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
own_cache.use()
# Without a GPU, Triton's kernels run in its interpreter. It asks when it is imported, and torch imports it early.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# `repeatable`, the default and what CI runs: the examples follow from the source of the test and of the package, and no
# example database is read, so that a commit passes or fails in the same way on every run. `thorough`, in `make proof`:
# new examples at every run; those that fail are kept in .hypothesis, and the report says how to repeat them.
# Neither judges by time: how long an example takes to draw or to run depends on the machine's load.
_NO_CLOCK: dict[str, Any] = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("repeatable", max_examples=100, derandomize=True, **_NO_CLOCK)
hypothesis.settings.register_profile("thorough", max_examples=20_000, derandomize=False, print_blob=True, **_NO_CLOCK)
hypothesis.settings.load_profile("repeatable")


pytest_configure = skips.pytest_configure
pytest_runtest_makereport = skips.pytest_runtest_makereport
pytest_terminal_summary = skips.pytest_terminal_summary


@pytest.fixture
def unique() -> Callable[[str], str]:
    """``unique("topic")`` → a name that no other test uses."""
    return unique_name


@pytest.fixture(scope="session")
def embedded_broker() -> Iterator[str]:
    """``host:port`` of the embedded broker, shared by the session."""
    broker = EmbeddedBroker()
    asyncio.run(broker.start())
    yield broker.bootstrap_servers
    broker.stop()


@pytest.fixture(scope="session")
def kafka_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``host:port`` of an Apache Kafka node, shared by the session. Tests that use it carry the marker ``kafka``."""
    node = KafkaNode(tmp_path_factory.mktemp("kafka"))
    asyncio.run(node.start())
    yield node.bootstrap_servers
    node.stop()


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """URL of moto's S3 server, in a thread of this process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for every request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def _use(part: S3Part, monkeypatch: pytest.MonkeyPatch) -> S3Part:
    for name, value in part.environment.items():
        monkeypatch.setenv(name, value)
    return part


@pytest.fixture
def s3(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> S3Part:
    """moto's S3 server with a client and ``make_bucket()``; the AWS SDK's variables are set for the test."""
    return _use(S3Part(moto_endpoint, "test", "testsecret"), monkeypatch)


@pytest.fixture(scope="session")
def versity_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VersityNode]:
    """A real S3 server, shared by the session."""
    node = VersityNode(tmp_path_factory.mktemp("s3"))
    node.start()
    yield node
    node.stop()


@pytest.fixture
def versity_s3(versity_node: VersityNode, monkeypatch: pytest.MonkeyPatch) -> S3Part:
    """The real S3 server as ``s3``. Tests that use it carry the marker ``s3``."""
    return _use(versity_node.part, monkeypatch)


@pytest.fixture(scope="session")
def minio_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioNode]:
    """A MinIO server, shared by the session."""
    from docker.errors import ImageNotFound

    node = MinioNode(tmp_path_factory.mktemp("minio"))
    try:
        node.start()
    except ImageNotFound as error:  # its makers have withdrawn images before
        pytest.skip(f"MinIO: no MINIO, and the image cannot be pulled: {error}")
    yield node
    node.stop()


@pytest.fixture
def minio_s3(minio_node: MinioNode, monkeypatch: pytest.MonkeyPatch) -> S3Part:
    """MinIO as ``s3``. Tests that use it carry the marker ``minio``."""
    return _use(minio_node.part, monkeypatch)


_STAGES = "nanovllm.pipeline.stages"
_LEVELLED = ("aiokafka", "botocore", "boto3", "urllib3", "httpx", "httpcore", "botocore.credentials",
             "opentelemetry.exporter.otlp.proto.http.trace_exporter", "opentelemetry.exporter.otlp.common",
             f"{_STAGES}.failure", f"{_STAGES}.invalid_records")  # fmt: skip


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Puts back what a worker changes in its process: log handlers and signal handlers."""
    root, numbers = logging.getLogger(), (signal.SIGINT, signal.SIGTERM)
    handlers, level, signals = root.handlers[:], root.level, [signal.getsignal(number) for number in numbers]
    loggers = [logging.getLogger(name) for name in _LEVELLED]
    levels = [logger.level for logger in loggers]
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for logger, one in zip(loggers, levels, strict=True):
        logger.setLevel(one)
    for number, handler in zip(numbers, signals, strict=True):
        if handler is not None:  # None: not Python's
            signal.signal(number, handler)
