"""What `nanovllm doctor` says of brokers, topics, buckets and the port."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import Any

import pytest
from parts import S3Part, create_topic, unique_name

from nanovllm.cli.diagnostics import surroundings
from nanovllm.cli.main import main
from nanovllm.settings.worker import Settings


def settings(**sections: dict[str, Any]) -> Settings:
    topics = {name: unique_name(name) for name in ("jobs", "results", "metrics", "dead_letters")}
    return Settings.model_validate({"topics": topics, "http": {"host": "127.0.0.1", "port": 0}, **sections})


def told(settings: Settings) -> dict[str, tuple[str, str]]:
    return {subject: (value, note) for subject, value, note, _ in surroundings(settings)}


async def test_topics_that_are_missing_are_named_and_none_is_made(embedded_broker: str) -> None:
    own = settings(kafka={"bootstrap_servers": embedded_broker})
    await create_topic(embedded_broker, own.topics.jobs, own.topics.results)
    for _ in range(2):
        found = await asyncio.to_thread(told, own)
        assert found["brokers"][0] == f"answer at {embedded_broker}"
        assert found["topics"][0] == "2 of 4 are there"
        assert {own.topics.metrics, own.topics.dead_letters} <= set(
            found["topics"][1].replace(",", "").replace(";", "").split()
        )


def test_brokers_that_do_not_answer_are_a_line_of_the_table() -> None:
    found = told(settings(kafka={"bootstrap_servers": "127.0.0.1:1"}))
    assert found["brokers"][0] == "do not answer"
    assert "127.0.0.1:1" in found["brokers"][1]
    assert found["object store"][0] == "not used"


def test_a_port_in_use_is_told() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        kafka = {"bootstrap_servers": "127.0.0.1:1"}
        assert (
            told(settings(kafka=kafka, http={"host": "127.0.0.1", "port": port}))["http port"][0]
            == f"{port} is not free"
        )


def test_each_replica_has_its_port_and_its_cores(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setenv("NANOVLLM_ENGINE__BACKEND", "echo")
    monkeypatch.setenv("NANOVLLM_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.setenv("NANOVLLM_REPLICAS", "2")
    assert main(["doctor", "--json"]) == 0
    rows = [(row["what"], row["is"]) for row in json.loads(capsys.readouterr().out)]
    assert ("replicas", "2, on cores 0 | 1") in rows
    assert [value.split()[0] for subject, value in rows if subject == "http port"] == ["8080", "8081"]
    monkeypatch.setenv("NANOVLLM_HTTP__PORT", "65535")
    assert main(["doctor", "--json"]) == 2
    assert "http.port=65535: the last of 2 replicas would listen on port 65536; set 65534" in capsys.readouterr().err


def store(s3: S3Part, *buckets: str, endpoint_url: str | None = None) -> dict[str, tuple[str, str]]:
    allow = [f"s3://{bucket}/in" for bucket in buckets]
    options = {"endpoint_url": endpoint_url or s3.endpoint_url, "addressing_style": "path", "allow": allow}
    return told(settings(kafka={"bootstrap_servers": "127.0.0.1:1"}, s3=options))


def test_each_bucket_is_asked_for(s3: S3Part) -> None:
    there = s3.make_bucket()
    found = store(s3, there, "no-such-bucket")
    assert found[f"bucket {there}"] == ("answers", "")
    assert found["bucket no-such-bucket"][0] == "does not exist"


def test_a_store_that_does_not_answer_is_told_by_its_setting(s3: S3Part) -> None:
    value, note = store(s3, "receipts", endpoint_url="http://127.0.0.1:1")["bucket receipts"]
    assert value == "does not answer"
    assert "NANOVLLM_S3__ENDPOINT_URL" in note


@pytest.mark.s3
def test_a_real_store_that_refuses_the_key_is_told(versity_s3: S3Part, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = versity_s3.make_bucket()
    assert store(versity_s3, bucket)[f"bucket {bucket}"] == ("answers", "")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    value, note = store(versity_s3, bucket)[f"bucket {bucket}"]
    assert value == "does not answer"
    assert "credentials" in note


async def test_the_check_of_the_doctor_fails_until_everything_answers(
    embedded_broker: str, s3: S3Part, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = settings(kafka={"bootstrap_servers": embedded_broker})
    topics = own.topics.model_dump(include={"jobs", "results", "metrics", "dead_letters"})
    variables = {
        "ENGINE__BACKEND": "echo",
        "KAFKA__BOOTSTRAP_SERVERS": embedded_broker,
        "HTTP__PORT": "0",
        **{f"TOPICS__{name.upper()}": topic for name, topic in topics.items()},
    }
    for name, value in variables.items():
        monkeypatch.setenv(f"NANOVLLM_{name}", value)
    assert await asyncio.to_thread(main, ["doctor"]) == 0
    assert "echo (engine.backend echo)" in capsys.readouterr().out
    assert await asyncio.to_thread(main, ["doctor", "--check"]) == 1
    await create_topic(embedded_broker, *topics.values())
    assert await asyncio.to_thread(main, ["doctor", "--check"]) == 0
    monkeypatch.setenv("NANOVLLM_S3__ENDPOINT_URL", s3.endpoint_url)
    monkeypatch.setenv("NANOVLLM_S3__ADDRESSING_STYLE", "path")
    monkeypatch.setenv("NANOVLLM_S3__ALLOW", "s3://no-such-bucket")
    assert await asyncio.to_thread(main, ["doctor", "--check"]) == 1
    monkeypatch.setenv("NANOVLLM_KAFKA__BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.delenv("NANOVLLM_S3__ALLOW")
    assert await asyncio.to_thread(main, ["doctor", "--check"]) == 1
