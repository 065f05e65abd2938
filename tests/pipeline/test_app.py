"""The worker as a real process: starts, answers, drains, and says how it ended by its exit code."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from parts import S3Part, create_topic
from PIL import Image

from nanovllm.demo.child_process import free_port
from nanovllm.pipeline import app


@dataclass
class Setup:
    """Topics and variables for one worker process."""

    bootstrap_servers: str
    topics: dict[str, str]
    environment: dict[str, str]
    http_port: int

    @asynccontextmanager
    async def worker(self, *arguments: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "nanovllm.cli.main",
            "worker",
            *arguments,
            env={**os.environ, **self.environment, **environment},
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    async def send(self, *jobs: dict[str, Any]) -> None:
        async with AIOKafkaProducer(bootstrap_servers=self.bootstrap_servers) as producer:
            for job in jobs:
                await producer.send_and_wait(self.topics["jobs"], json.dumps(job).encode(), partition=0)

    async def results(self, count: int) -> set[str]:
        consumer = AIOKafkaConsumer(
            self.topics["results"], bootstrap_servers=self.bootstrap_servers, auto_offset_reset="earliest"
        )
        await consumer.start()
        found: set[str] = set()
        try:
            async with asyncio.timeout(60):
                while len(found) < count:
                    for batch in (await consumer.getmany(timeout_ms=200)).values():
                        found |= {record.key.decode() for record in batch}
        finally:
            await consumer.stop()
        return found

    async def committed(self) -> int | None:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.bootstrap_servers,
            group_id=self.environment["NANOVLLM_KAFKA__GROUP_ID"],
            enable_auto_commit=False,
        )
        await consumer.start()
        try:
            return await consumer.committed(TopicPartition(self.topics["jobs"], 0))
        finally:
            await consumer.stop()

    async def get(self, path: str) -> tuple[int, str]:
        def ask() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=10) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()
            except OSError:
                return 0, ""

        return await asyncio.to_thread(ask)

    async def until_readyz(self, status: int, says: str = "") -> None:
        for _ in range(600):
            answer, body = await self.get("/readyz")
            if answer == status and says in body:
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"/readyz never answered {status} with {says!r}")


@pytest.fixture
async def setup(embedded_broker: str, unique: Callable[[str], str], s3: S3Part) -> Setup:
    topics = {name: unique(name) for name in ("jobs", "results", "metrics", "dead_letters")}
    await create_topic(embedded_broker, *topics.values(), partitions=1)
    port = free_port()
    environment = {
        "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": embedded_broker,
        "NANOVLLM_KAFKA__GROUP_ID": unique("group"),
        **{f"NANOVLLM_TOPICS__{name.upper()}": topic for name, topic in topics.items()},
        "NANOVLLM_ENGINE__BACKEND": "echo",
        "NANOVLLM_HTTP__HOST": "127.0.0.1",
        "NANOVLLM_HTTP__PORT": str(port),
        "NANOVLLM_S3__ALLOW": "s3://images",
        "NANOVLLM_S3__ADDRESSING_STYLE": "path",
        "NANOVLLM_S3__ENDPOINT_URL": s3.endpoint_url,
        "NANOVLLM_ADMISSION__IDLE_EXIT_S": "0.5",
        "NANOVLLM_IMAGES__DECODERS": "1",
    }
    return Setup(embedded_broker, topics, environment, port)


class SlowStore:
    """An S3 server that answers every object with one image once ``gate`` is open."""

    def __init__(self) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4)).save(buffer, "PNG")
        self._body = buffer.getvalue()
        self.gate = asyncio.Event()
        self.asked = asyncio.Event()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0, family=socket.AF_INET)
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.asked.set()
        await self.gate.wait()
        writer.write(
            b'HTTP/1.1 200 OK\r\nConnection: close\r\nETag: "tag"\r\nContent-Length: %d\r\n\r\n' % len(self._body)
            + self._body
        )
        await writer.drain()
        writer.close()


async def test_the_metrics_name_the_worker(setup: Setup) -> None:
    async with setup.worker() as worker:
        await setup.until_readyz(200)
        _, metrics = await setup.get("/metrics")
        worker.terminate()
        await asyncio.wait_for(worker.wait(), 60)
    (line,) = re.findall(r"^nanovllm_worker_info\{.*\} 1\.0$", metrics, re.MULTILINE)
    labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
    revision = labels.pop("revision")
    assert labels == {"version": version("nanovllm"), "model": "echo", "backend": "echo"}
    assert revision


async def test_lines_in_json_name_the_job_that_they_are_about(setup: Setup) -> None:
    setup.environment["NANOVLLM_LOG_FORMAT"] = "json"
    await setup.send({"job_id": "wrong", "prompt": "<|image|>", "images": ["s3://elsewhere/a.png"]})
    async with setup.worker("--exit-when-drained") as worker:
        _, said = await asyncio.wait_for(worker.communicate(), 60)
    lines = [json.loads(line) for line in said.decode().splitlines()]
    assert all(line["worker_id"] and line["level"] and line["message"] for line in lines)
    (about,) = [line for line in lines if line.get("job_id") == "wrong"]
    assert (about["topic"], about["partition"], about["offset"]) == (setup.topics["jobs"], 0, 0)


async def test_answers_what_is_there_and_leaves_when_drained(setup: Setup) -> None:
    await setup.send(*({"job_id": f"j{i}", "prompt": f"say {i}"} for i in range(30)))
    async with setup.worker("--exit-when-drained") as worker:
        assert await setup.results(30) == {f"j{i}" for i in range(30)}
        _, said = await asyncio.wait_for(worker.communicate(), 60)
        assert worker.returncode == 0
    for phase in ("the brokers and topics are there", "the model is loaded and the decoders are started"):
        assert re.search(rf"{phase}: \d+\.\d s", said.decode()), "each phase of a start is told with its seconds"
    assert await setup.committed() == 30


async def test_a_certificate_that_is_missing_is_told_before_the_model_is_loaded(setup: Setup) -> None:
    environment = {
        "NANOVLLM_KAFKA__SECURITY_PROTOCOL": "SSL",
        "NANOVLLM_KAFKA__SSL_CAFILE": "/nowhere/ca.pem",
        "NANOVLLM_ENGINE__BACKEND": "native",
        "NANOVLLM_ENGINE__MODEL": "/nowhere/model",
    }
    async with setup.worker(**environment) as worker:
        _, errors = await asyncio.wait_for(worker.communicate(), 60)
        assert worker.returncode == 2
    assert b"kafka.ssl_cafile" in errors
    assert b"/nowhere/model" not in errors


async def test_is_ready_once_in_the_group_and_shows_its_metrics(setup: Setup) -> None:
    async with setup.worker() as worker:
        await setup.until_readyz(200)
        await setup.send({"job_id": "j", "prompt": "p"})
        await setup.results(1)
        assert (await setup.get("/healthz"))[0] == 200
        text = (await setup.get("/metrics"))[1]
        assert 'nanovllm_jobs_total{outcome="result"} 1.0' in text.splitlines()
        assert "nanovllm_num_requests_running 0.0" in text.splitlines()
        worker.terminate()
        assert await asyncio.wait_for(worker.wait(), 60) == 0


async def test_sigterm_finishes_and_commits_what_is_at_work(setup: Setup) -> None:
    store = SlowStore()
    await setup.send({"job_id": "slow", "prompt": "<|image|>", "images": ["s3://images/a.png"]})
    async with store.serving() as url, setup.worker(NANOVLLM_S3__ENDPOINT_URL=url) as worker:
        await asyncio.wait_for(store.asked.wait(), 60)
        worker.terminate()
        await setup.until_readyz(503, "draining")
        await setup.send({"job_id": "later", "prompt": "p"})
        store.gate.set()
        assert await asyncio.wait_for(worker.wait(), 60) == 0
    assert await setup.results(1) == {"slow"}
    assert await setup.committed() == 1


async def test_what_outlasts_the_drain_goes_back_to_kafka(setup: Setup) -> None:
    store = SlowStore()
    await setup.send({"job_id": "stuck", "prompt": "<|image|>", "images": ["s3://images/a.png"]})
    environment = {"NANOVLLM_ADMISSION__DRAIN_TIMEOUT_S": "1"}
    async with store.serving() as url, setup.worker(NANOVLLM_S3__ENDPOINT_URL=url, **environment) as worker:
        await asyncio.wait_for(store.asked.wait(), 60)
        worker.terminate()
        assert await asyncio.wait_for(worker.wait(), 20) == 0
    assert await setup.committed() == 0


async def test_a_second_signal_ends_the_process_at_once(setup: Setup) -> None:
    store = SlowStore()
    await setup.send({"job_id": "stuck", "prompt": "<|image|>", "images": ["s3://images/a.png"]})
    async with store.serving() as url, setup.worker(NANOVLLM_S3__ENDPOINT_URL=url) as worker:
        await asyncio.wait_for(store.asked.wait(), 60)
        worker.send_signal(signal.SIGINT)
        await setup.until_readyz(503, "draining")
        worker.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(worker.wait(), 20) == 1  # a drain takes 25


@pytest.mark.parametrize(
    ("environment", "code", "says"),
    [
        ({"NANOVLLM_ENGINE__BACKEND": "native", "NANOVLLM_ENGINE__MODEL": "no/such-model"}, 2, "no/such-model"),
        ({"NANOVLLM_KAFKA__BOOSTRAP_SERVERS": "typo:9"}, 2, "NANOVLLM_KAFKA__BOOSTRAP_SERVERS"),
        ({"NANOVLLM_S3__ENDPOINT_URL": "minio:9000"}, 2, "NANOVLLM_S3__ENDPOINT_URL"),
        ({"NANOVLLM_S3__REGION": "eu west"}, 2, "'eu west' is no region"),
        ({"AWS_PROFILE": "absent"}, 2, "no AWS profile 'absent'"),
    ],
)
async def test_what_cannot_work_is_said_at_the_start(
    setup: Setup, environment: dict[str, str], code: int, says: str
) -> None:
    async with setup.worker(**environment) as worker:
        _, said = await asyncio.wait_for(worker.communicate(), 60)
    assert worker.returncode == code
    assert says in " ".join(said.decode().split())


@pytest.mark.parametrize("devices", [(), ("/dev/null",)])
def test_triton_is_left_out_where_there_is_no_gpu(devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "GPU_DEVICES", devices)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with monkeypatch.context() as modules:
        modules.delitem(sys.modules, "triton", raising=False)
        app.leave_out_triton()
        assert ("triton" in sys.modules) == (not devices and sys.platform == "linux")
        sys.modules.pop("triton", None)
