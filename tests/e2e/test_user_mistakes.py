"""Mistakes of users, one after another: the first line that each is answered with, and the exit code.

The lines are held in tests/golden/user_mistakes.json; `UPDATE_GOLDEN=1` writes what is said now.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from parts import KafkaNode, S3Part, create_topic, kafka_node_program

from nanovllm.cli.main import main

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "user_mistakes.json"
pytestmark = [
    pytest.mark.kafka,
    pytest.mark.s3,
    pytest.mark.skipif(kafka_node_program() is None, reason="a node of its own: no KAFKA_NODE, no ../shared/kafka"),
]


@dataclass(frozen=True)
class Mistake:
    """One command and what is wrong around it; ``{…}`` is filled in by the test."""

    name: str
    command: str
    environment: dict[str, str] = field(default_factory=dict)


def worker(name: str, /, **settings: str) -> Mistake:
    environment = {"NANOVLLM_ENGINE__BACKEND": "echo", "NANOVLLM_LOG_LEVEL": "warning"}
    return Mistake(name, "worker", environment | {f"NANOVLLM_{key}": value for key, value in settings.items()})


EXISTING = {"NANOVLLM_TOPICS__JOBS": "existing"}
MISTAKES = [
    Mistake("a command that is none", "sumbit"),
    Mistake("an option that is none", "submit --promt x"),
    Mistake("a value that is none of the choices", "submit -p x --key picture"),
    Mistake("nothing to send", "submit"),
    Mistake("a file that is not there", "submit {tmp}/nope.png -p x"),
    Mistake("images without a prompt", "submit s3://receipts/a.png"),
    Mistake("a URL that no object has", "submit ftp://example.com/a.png -p x"),
    Mistake("a host that is not allowed", "submit https://example.com/a.png -p x"),
    Mistake("a URL with a password", "submit https://user:secret@example.com/a.png -p x"),
    Mistake("a prompt file that is not there", "submit s3://receipts/a.png --prompt-file {tmp}/nope.txt"),
    Mistake("a file of jobs with a broken line", "submit {tmp}/jobs.jsonl"),
    Mistake("a topic that no worker reads", "submit -p x --topic elsewhere"),
    Mistake("a topic of jobs that is missing", "submit -p x"),
    Mistake("brokers that are not there", "submit -p x -b 127.0.0.1:1"),
    Mistake("a bucket that is missing", "submit {tmp}/large.png -p x --upload s3://no-such-bucket/in", EXISTING),
    Mistake("a topic of results that is missing", "results"),
    Mistake("more copies than brokers", "topics create --replication 3"),
    Mistake("another number of partitions", "topics create --partitions 12", EXISTING),
    Mistake("fewer partitions", "topics create --partitions 1", EXISTING),
    Mistake("a topic of dead letters that is missing", "dlq list"),
    Mistake("a class of errors that is none", "dlq list --class hopeless"),
    Mistake("a time that is none", "dlq list --since yesterday"),
    Mistake("a replay of everything by accident", "dlq replay"),
    worker("a configuration file that is not there", CONFIG="{tmp}/nope.yaml"),
    worker("a setting that is none", KAFKA__BOOSTRAP_SERVERS="x:9092"),
    worker("a value of the wrong type", HTTP__PORT="http"),
    worker("bad JSON in a variable", TOPICS__LANES="{{urgent: -1}}"),
    worker("bad JSON in a list of tenants", TENANTS__WEIGHTS='{{"acme": 3'),
    worker("a port in use", HTTP__PORT="{port}"),
    worker("an image format that is none", IMAGES__FORMATS="PNG,JPG"),
    worker("a GPU that is not there", ENGINE__BACKEND="native", ENGINE__DEVICE="cuda"),
    worker("a device that is none", ENGINE__BACKEND="native", ENGINE__DEVICE="gpu"),
    worker("a model that is not there", ENGINE__BACKEND="native", ENGINE__MODEL="{tmp}/model"),
    worker("an endpoint without a scheme", S3__ENDPOINT_URL="minio:9000"),
    worker("a path where a host is allowed", HTTP_IMAGES__ALLOW="https://example.com/images"),
    worker(
        "an authority of image hosts that is not there",
        HTTP_IMAGES__ALLOW="a.test",
        HTTP_IMAGES__CA_FILE="{tmp}/ca.pem",
    ),
    worker("topics that are missing"),
    worker("a certificate that is not there", KAFKA__SECURITY_PROTOCOL="SSL", KAFKA__SSL_CAFILE="{tmp}/ca.pem"),
    Mistake("too few jobs for the demo", "demo --jobs 3"),
    Mistake("a checkpoint that is not there", "convert {tmp}/nope.gguf {tmp}/out"),
    Mistake("an output that is there", "convert {tmp} {tmp}"),
    Mistake("an object that is not there", "submit s3://receipts/nope.png -p x", EXISTING),
    Mistake(
        "a folder that is not there",
        "run -i {tmp}/jobs.jsonl -o {tmp}/results.jsonl --allowed-local-media-path {tmp}/nope",
    ),
]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaNode]:
    """Apache Kafka that creates no topic by itself."""
    node = KafkaNode(tmp_path_factory.mktemp("kafka"), settings={"auto.create.topics.enable": "false"})
    asyncio.run(node.start())
    asyncio.run(create_topic(node.bootstrap_servers, "existing", partitions=2))
    yield node
    node.stop()


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_a_mistake_is_answered_by_one_line_and_an_exit_code(
    mistake: Mistake,
    node: KafkaNode,
    versity_s3: S3Part,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a"}\n{"prompt": 1}\n')
    (tmp_path / "large.png").write_bytes(os.urandom(2 * 2**20))
    monkeypatch.setattr("nanovllm.pipeline.app.forbid_debugging", lambda: None)
    with taken_port() as port:
        filled = {
            "tmp": str(tmp_path),
            "port": str(port),
            "broker": node.bootstrap_servers,
            "s3": versity_s3.endpoint_url,
        }
        settings = {
            "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": "{broker}",
            "NANOVLLM_S3__ENDPOINT_URL": "{s3}",
            "NANOVLLM_S3__ADDRESSING_STYLE": "path",
            "NANOVLLM_S3__ALLOW": "s3://receipts",
            "NANOVLLM_HTTP__HOST": "127.0.0.1",
            "NANOVLLM_HTTP__PORT": "0",
        }
        for name, value in (settings | mistake.environment).items():
            monkeypatch.setenv(name, value.format(**filled))
        code = main(mistake.command.format(**filled).split())
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.strip()]
    ours = [line for line in lines if "nanovllm" in line and "aiokafka" not in line] or lines
    said = re.sub(r"^\d{4}-\d\d-\d\d [\d:,]+ ", "", ours[0])
    for name in ("tmp", "broker", "s3", "port"):
        said = said.replace(filled[name], f"{{{name}}}")
    answer = {"command": mistake.command, "exit": code, "says": said}
    if os.environ.get("UPDATE_GOLDEN"):
        held = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
        held[mistake.name] = answer
        GOLDEN.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert answer == json.loads(GOLDEN.read_text(encoding="utf-8")).get(mistake.name)
    assert len(ours) == 1, f"one line, and no traceback: {ours}"
    assert shown.out == ""


def test_the_golden_file_holds_these_mistakes_and_no_others() -> None:
    held = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert list(held) == [mistake.name for mistake in MISTAKES]
    codes = [answer["exit"] for answer in held.values()]
    assert set(codes) <= {1, 2}
    # What only somebody else can mend, or may be mended by waiting, has failed; everything else is the user's.
    failed = {name for name, answer in held.items() if answer["exit"] == 1}
    assert failed <= {"brokers that are not there"}
