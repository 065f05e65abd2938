"""Secrets in every place that takes one: none comes out in a log, a result, a dead letter, a metric or an error."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from bench import Bench, FaultyFetcher, eventually, reached
from parts import worker_process
from pydantic import BaseModel, SecretStr

from nanovllm.cli.main import main
from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import ConfigurationError, FetchFailed
from nanovllm.settings.loading import load_settings
from nanovllm.settings.worker import Settings

# Words of which no text may hold one; each says where it was planted.
PLANTED = {
    place: f"hunter2-{place}"
    for place in (
        "sasl-password",
        "key-password",
        "endpoint-user",
        "aws-key",
        "header",
        "prompt",
        "metadata",
        "uri-query",
        "sampling",
        "exception",
        "job-data",
        "api-key",
    )
}


def leaks(text: str, *, allowed: tuple[str, ...] = ()) -> list[str]:
    return [place for place, word in PLANTED.items() if word in text and place not in allowed]


def secret_settings(model: type[BaseModel], path: str = "") -> list[str]:
    """The names of all settings that are secrets."""
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += secret_settings(field.annotation, f"{path}{name}__")
        elif SecretStr.__name__ in str(field.annotation):
            found.append(f"{path}{name}")
    return found


def test_every_setting_that_sounds_like_a_secret_is_one() -> None:
    def names(model: type[BaseModel], path: str = "") -> list[str]:
        return [
            inner
            for name, field in model.model_fields.items()
            for inner in (
                names(field.annotation, f"{path}{name}__")
                if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
                else [f"{path}{name}"]
            )
        ]

    telling = {
        name
        for name in names(Settings)
        if any(word in name for word in ("password", "secret", "credential", "api_key"))
    }
    assert telling == set(secret_settings(Settings)) != set()


def test_no_secret_setting_is_shown_printed_or_named_in_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    values = {
        "NANOVLLM_KAFKA__SECURITY_PROTOCOL": "SASL_SSL",
        "NANOVLLM_KAFKA__SASL_MECHANISM": "SCRAM-SHA-512",
        "NANOVLLM_KAFKA__SASL_USERNAME": "worker",
        "NANOVLLM_KAFKA__SASL_PASSWORD": PLANTED["sasl-password"],
        "NANOVLLM_KAFKA__SSL_CERTFILE": "/cert.pem",
        "NANOVLLM_KAFKA__SSL_KEY_PASSWORD": PLANTED["key-password"],
        "NANOVLLM_S3__ENDPOINT_URL": f"http://user:{PLANTED['endpoint-user']}@s3.example",
        "AWS_SECRET_ACCESS_KEY": PLANTED["aws-key"],
        "NANOVLLM_ENGINE__BACKEND": "openai",
        "NANOVLLM_REMOTE__ENDPOINTS": "http://a/v1",
        "NANOVLLM_REMOTE__API_KEYS": PLANTED["api-key"],
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert not leaks(settings.masked_yaml())
    assert not leaks(repr(settings.kafka) + str(settings.model_dump()["kafka"]))
    assert not leaks(repr(settings.remote) + str(settings.model_dump()["remote"]))
    assert main(["worker", "--print-config"]) == 0
    assert main(["topics", "acls"]) == 0
    for name in values:
        # Each in a form that its setting refuses, if it can refuse any.
        monkeypatch.setenv(name, values[name])
        monkeypatch.setenv("NANOVLLM_ADMISSION__MAX_JOBS", PLANTED["prompt"])
        assert main(["worker", "--print-config"]) == 2
    file = tmp_path / "broken.yaml"
    file.write_text(f"kafka: {{sasl_password: '{PLANTED['sasl-password']}")
    assert main(["worker", "--config", str(file)]) == 2
    shown = capsys.readouterr()
    assert not leaks(shown.out + shown.err)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert not leaks(str(caught.value))


async def test_nothing_planted_in_a_job_reaches_a_log_a_dead_letters_headers_or_a_metric(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(request: Request) -> BaseException | None:
        return RuntimeError(PLANTED["exception"]) if request.request_id.startswith("internal") else None

    error = FetchFailed("the object store broke off")
    error.__cause__ = ConnectionError(f"https://user:{PLANTED['aws-key']}@s3/?X-Amz-Signature={PLANTED['uri-query']}")
    headers = [("authorization", PLANTED["header"].encode()), ("cookie", PLANTED["header"].encode())]
    uri = f"s3://images/a.png?{PLANTED['uri-query']}"
    jobs: list[dict[str, Any] | bytes] = [
        {"job_id": "answered", "prompt": "p"},
        {"job_id": "internal", "prompt": PLANTED["prompt"], "metadata": {"k": PLANTED["metadata"]}},
        {"job_id": "fetch", "prompt": "<|image|>", "images": [uri]},
        {"job_id": "forbidden", "prompt": "<|image|>", "images": [f"s3://other/{PLANTED['uri-query']}"]},
        {"job_id": "sampling", "prompt": "p", "sampling": {"temperature": PLANTED["sampling"]}},
        {"job_id": "image", "prompt": "<|image|>", "images": [{"data": PLANTED["job-data"]}]},
        {"job_id": "scheme", "prompt": "<|image|>", "images": [f"https://x/?{PLANTED['uri-query']}"]},
        {"job_id": "reply", "prompt": "p", "reply_to": PLANTED["metadata"]},
        f'{{"job_id": "broken", "prompt": "{PLANTED["prompt"]}'.encode(),
    ]
    with caplog.at_level(logging.DEBUG, logger="nanovllm"):
        await bench.send(*jobs, headers=headers)
        async with bench.working(EchoEngine(fault=fault), FaultyFetcher(bench.settings, error)):
            letters = await bench.dead_letters(len(jobs) - 1)
            results = await bench.read(bench.settings.topics.results, 1)
            await eventually(lambda: reached(bench, len(jobs)))
    assert not leaks(json.dumps([headers for headers, _ in letters]))
    assert not leaks(repr([(record.headers, record.value) for record in results]))
    # The log of a fault of the worker's own holds the exception, for whoever mends it; nothing else does.
    assert not leaks(caplog.text, allowed=("exception",))
    assert not leaks(bench.metrics.exposition().decode())
    assert not leaks(bench.health.systemic or "")


async def test_a_worker_that_logs_everything_logs_no_password(bench: Bench, tmp_path: Path) -> None:
    topics = bench.settings.topics
    await bench.send({"job_id": "j", "prompt": PLANTED["prompt"]}, headers=[("auth", PLANTED["header"].encode())])
    settings = {
        "NANOVLLM_LOG_LEVEL": "debug",
        "NANOVLLM_ENGINE__BACKEND": "echo",
        "NANOVLLM_KAFKA__BOOTSTRAP_SERVERS": bench.bootstrap_servers,
        "NANOVLLM_KAFKA__GROUP_ID": bench.settings.kafka.group_id,
        # The embedded broker takes any password. aiokafka's own debug log would show it.
        "NANOVLLM_KAFKA__SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "NANOVLLM_KAFKA__SASL_MECHANISM": "PLAIN",
        "NANOVLLM_KAFKA__SASL_USERNAME": "worker",
        "NANOVLLM_KAFKA__SASL_PASSWORD": PLANTED["sasl-password"],
        "NANOVLLM_S3__ENDPOINT_URL": f"http://user:{PLANTED['endpoint-user']}@127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": PLANTED["aws-key"],
        "NANOVLLM_ADMISSION__IDLE_EXIT_S": "0.5",
        **{f"NANOVLLM_TOPICS__{name.upper()}": getattr(topics, name) for name in ("jobs", "results", "metrics")},
        "NANOVLLM_TOPICS__DEAD_LETTERS": topics.dead_letters,
    }
    worker = worker_process(tmp_path, "--exit-when-drained", settings=settings)
    worker.start()
    try:
        await eventually(lambda: not worker.is_running, timeout_s=120)
    finally:
        worker.kill()
    log = (tmp_path / "worker.log").read_text()
    assert worker.exit_code == 0, log[-2_000:]
    assert "DEBUG" in log
    assert not leaks(log)
