"""The programs of examples/ on real parts, and the Compose file as far as it can be read without Docker."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import pytest
import yaml
from bench import Bench, bench_on
from parts import S3Part
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from nanovllm.demo.broker import EmbeddedBroker
from nanovllm.demo.child_process import LocalProcess, free_port
from nanovllm.demo.documents import demo_documents
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.settings.loading import unknown_variables

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = {"jobs": "nanovllm.jobs", "results": "nanovllm.results", "dead_letters": "nanovllm.dead-letters"}


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
async def bench(unique: Callable[[str], str], s3: S3Part, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    """A bench on a broker of its own, with the topics' default names."""
    broker = EmbeddedBroker()
    await broker.start()
    monkeypatch.setenv("BROKERS", broker.bootstrap_servers)
    async with bench_on(broker.bootstrap_servers, lambda name: NAMES.get(name) or unique(name), s3) as bench:
        yield bench
    broker.stop()


async def test_the_producer_prints_each_result_and_fails_with_a_dead_letter(
    bench: Bench, images: Callable[[str, bytes], str], capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import png

    good, broken = images("good.png", png()), images("broken.png", png()[:40])
    async with bench.working(EchoEngine()):
        assert await program("producer").main("Total? <|image|>", [good]) == 0
        assert capsys.readouterr().out.startswith(f"{good} Total?")
        assert await program("producer").main("Total? <|image|>", [good, broken]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{good} Total?")
    assert shown.err.startswith(f"{broken} invalid_image")


async def test_the_reader_shows_results_and_dead_letters_as_they_come(bench: Bench) -> None:
    lines: asyncio.Queue[str] = asyncio.Queue()
    reading = asyncio.create_task(program("reader").main(lines.put_nowait))
    async with bench.working(EchoEngine()):
        seen: list[dict[str, object]] = []
        number = 0
        while {str(line.get("code", line.get("status"))) for line in seen} != {"ok", "invalid_job"}:
            # The reader begins at the end of the topics, whenever it is ready.
            await bench.send({"job_id": f"r-{number}", "prompt": "p"}, b"broken")
            number += 1
            await asyncio.sleep(0.2)
            while not lines.empty():
                seen.append(json.loads(lines.get_nowait()))
    reading.cancel()
    await asyncio.wait([reading])


def test_the_compose_file_makes_the_object_that_its_head_asks_about(s3: S3Part) -> None:
    text = (EXAMPLES / "compose.yaml").read_text(encoding="utf-8")
    service = yaml.safe_load(text)["services"]["bucket"]
    asked = re.search(r"nanovllm submit .* s3://(\w+)/(\S+)$", text, re.MULTILINE)
    assert asked is not None
    environment = os.environ | service["environment"] | {"NANOVLLM_S3__ENDPOINT_URL": s3.endpoint_url}
    command = [sys.executable, *service["entrypoint"][1:], *service["command"]]
    for _ in range(2):  # it runs at every `up`
        subprocess.run(command, env=environment, check=True)
    picture = s3.client.get_object(Bucket=asked[1], Key=asked[2])["Body"].read()
    assert Image.open(io.BytesIO(picture)).size == (224, 224)


@pytest.mark.slow
async def test_the_compose_files_worker_makes_a_record_of_the_document_that_a_program_stores(
    s3: S3Part, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    compose = yaml.safe_load((EXAMPLES / "compose.yaml").read_text(encoding="utf-8"))
    (tmp_path / "routes.yaml").write_text(compose["configs"]["routes"]["content"])
    document = demo_documents().documents[1]
    (tmp_path / "tuesday.pdf").write_bytes(document.data)
    broker = EmbeddedBroker()
    await broker.start()
    environment = compose["services"]["worker"]["environment"] | {
        "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": broker.bootstrap_servers,
        "NANOVLLM_S3__ENDPOINT_URL": s3.endpoint_url,
        "NANOVLLM_DOCUMENTS__ROUTES": str(tmp_path / "routes.yaml"),
        "NANOVLLM_HTTP__PORT": str(free_port()),
        "BROKERS": broker.bootstrap_servers,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with contextlib.suppress(s3.client.exceptions.BucketAlreadyOwnedByYou):
        s3.client.create_bucket(Bucket="receipts")
    command = [sys.executable, "-m", "nanovllm.cli.main"]
    await asyncio.to_thread(subprocess.run, [*command, "topics", "create"], check=True)
    worker = LocalProcess("worker", [*command, "worker"], tmp_path / "worker.log")
    worker.start()
    try:
        uri = "s3://receipts/documents/tuesday.pdf"
        assert await program("documents").main(str(tmp_path / "tuesday.pdf"), uri) == 0, worker.tail(20)
    finally:
        worker.stop()
        broker.stop()
    printed = capsys.readouterr().out
    record = DocumentRecord.model_validate_json(printed[printed.index("{") :])
    assert record.value == [dict(truth) for truth in document.truths]
    beside = s3.client.get_object(Bucket="receipts", Key="documents/tuesday.pdf.json")["Body"].read()
    assert DocumentRecord.model_validate_json(beside) == record


def test_the_compose_file_sets_what_a_worker_knows() -> None:
    services = yaml.safe_load((EXAMPLES / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for service in services.values():
        assert "image" in service or (EXAMPLES / service["build"] / "Dockerfile").is_file()
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), "nothing is open to the network"
    worker = services["worker"]["environment"]
    assert not list(unknown_variables(worker))
    brokers = services["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert f"INTERNAL://{worker['NANOVLLM_KAFKA__BOOTSTRAP_SERVERS']}" in brokers


class Strict(BaseModel):
    """Keys of the Compose specification that the file uses, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


Duration = Annotated[str, Field(pattern=r"^([0-9]+(ms|s|m|h))+$")]


class HealthCheck(Strict):
    test: Annotated[list[str], Field(min_length=2)]
    interval: Duration
    timeout: Duration
    start_period: Duration


class Dependency(Strict):
    condition: Literal["service_started", "service_healthy", "service_completed_successfully"]


class Mounted(Strict):
    source: str
    target: str


class Service(Strict):
    # By a release's tag or a digest: what starts today starts next year.
    image: Annotated[str, Field(pattern=r"^[\w./-]+(:[\w.-]*[0-9][\w.-]*|@sha256:[0-9a-f]{64})$")] | None = None
    build: str | None = None
    command: str | list[str] | None = None
    entrypoint: list[str] | None = None
    environment: dict[str, str] = {}
    ports: list[str] = []
    configs: list[Mounted] = []
    depends_on: dict[str, Dependency] = {}
    restart: Literal["no", "always", "on-failure", "unless-stopped"] = "no"
    healthcheck: HealthCheck | None = None


class Config(Strict):
    content: str


class ComposeFile(Strict):
    services: dict[str, Service]
    configs: dict[str, Config]


def test_the_compose_file_has_keys_of_the_specification_pinned_images_and_checks_of_health() -> None:
    file = ComposeFile.model_validate(yaml.safe_load((EXAMPLES / "compose.yaml").read_text(encoding="utf-8")))
    for name, service in file.services.items():
        assert (service.image is None) != (service.build is None), name
        assert {one.source for one in service.configs} <= file.configs.keys()
        for other, dependency in service.depends_on.items():
            depended_on = file.services[other]
            if dependency.condition == "service_healthy":
                assert depended_on.healthcheck is not None, (
                    f"{name} waits for the health of {other}, which has no check"
                )
            # What is started again and again never completes.
            assert dependency.condition != "service_completed_successfully" or depended_on.restart == "no", other
    assert file.services["worker"].healthcheck is not None
    assert set(file.services["worker"].depends_on) == {"topics", "bucket"}


@pytest.mark.parametrize("command", [["docker", "compose"], ["docker-compose"]], ids=" ".join)
def test_compose_itself_reads_the_file(command: list[str]) -> None:
    """``config`` needs no engine."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} on this machine")
    version = subprocess.run([*command, "version", "--short"], capture_output=True, text=True, check=False)
    if version.returncode:
        pytest.skip(f"{' '.join(command)} does not answer: {version.stderr.strip()[:200]}")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version.stdout)[:2])
    if numbers < (2, 23):
        pytest.skip(f"{' '.join(command)} is {version.stdout.strip()}, and `configs` with `content` came with 2.23.1")
    read = [*command, "-f", str(EXAMPLES / "compose.yaml"), "config", "--format", "json"]
    found = subprocess.run(read, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    file = yaml.safe_load((EXAMPLES / "compose.yaml").read_text(encoding="utf-8"))
    assert json.loads(found.stdout)["services"].keys() == file["services"].keys()
