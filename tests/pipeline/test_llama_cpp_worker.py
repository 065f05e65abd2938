"""A worker process on Apache Kafka in front of llama.cpp's own server, which is killed while it answers."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from bench import Bench, answered, eventually, reached
from llama_cpp_server import MODEL, SLOT_TOKENS, WHERE, LlamaServer, llama_server_program, make_checkpoint
from parts import worker_process
from prometheus_client.parser import text_string_to_metric_families

from nanovllm.demo.child_process import free_port

pytestmark = [
    pytest.mark.kafka,
    pytest.mark.llamacpp,
    pytest.mark.proof,
    pytest.mark.skipif(llama_server_program() is None, reason=WHERE),
]

SCHEMA = {"type": "object", "properties": {"paid": {"type": "boolean"}}, "required": ["paid"]}


def samples(port: int) -> dict[tuple[str, tuple[str, ...]], float]:
    """The worker's metrics by name and label values."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        (sample.name, tuple(sample.labels.values())): sample.value for family in families for sample in family.samples
    }


async def test_jobs_in_front_of_a_server_that_dies_are_answered_guided_or_refused_and_counted(
    kafka_bench: Bench, tmp_path: Path
) -> None:
    bench = kafka_bench
    server = LlamaServer(make_checkpoint(tmp_path)[1], tmp_path)
    port = free_port()
    settings = {
        **bench.environment,
        "NANOVLLM_ENGINE__BACKEND": "openai",
        "NANOVLLM_ENGINE__MAX_NUM_SEQS": "4",
        "NANOVLLM_REMOTE__ENDPOINTS": server.url,
        "NANOVLLM_REMOTE__DIALECT": "llamacpp",
        "NANOVLLM_REMOTE__IMAGES": "false",
        "NANOVLLM_REMOTE__BREAKER_WAIT_S": "0.2",
        "NANOVLLM_KAFKA__GROUP_ID": bench.settings.kafka.group_id,
        "NANOVLLM_HTTP__PORT": str(port),
    }
    plain: list[dict[str, Any]] = [
        {"job_id": f"j{number}", "prompt": f"the total {number}", "sampling": {"max_tokens": 60, "ignore_eos": True}}
        for number in range(24)
    ]
    guided: dict[str, Any] = {"job_id": "guided", "prompt": "paid?"}
    guided["sampling"] = {"json_schema": SCHEMA, "max_tokens": 100}
    refused: list[dict[str, Any]] = [
        {"job_id": "long", "prompt": "total " * SLOT_TOKENS},
        {"job_id": "several", "prompt": "hello", "sampling": {"n": 2, "temperature": 1.0}},
        {"job_id": "regex", "prompt": "hello", "sampling": {"regex": "a+"}},
        {"job_id": "picture", "prompt": "see <|image|>", "images": ["s3://images/one.png"]},
    ]
    server.start()
    worker = worker_process(tmp_path, settings=settings)
    worker.start()
    try:
        await bench.send(*plain[:12], guided, *refused)
        await answered(bench, {"j0", "guided"})
        await bench.send(*plain[12:])
        await answered(bench, {"j12"})
        server.kill()
        await eventually(lambda: "no requests go there" in worker.tail(50), timeout_s=60)
        server.start()
        jobs = [*plain, guided]
        await answered(bench, {job["job_id"] for job in jobs})
        await eventually(lambda: reached(bench, len(jobs) + len(refused)), timeout_s=60)
        seen = await asyncio.to_thread(samples, port)
        worker.terminate()
        await eventually(lambda: not worker.is_running, timeout_s=60)
        assert worker.exit_code == 0, worker.tail(30)
    finally:
        worker.kill()
        server.kill()
    results = await bench.results(len(jobs))
    assert len(results) == len(jobs)
    assert type(json.loads(results["guided"]["text"])["paid"]) is bool
    for job in plain:
        result = results[job["job_id"]]
        assert (result["finish_reason"], result["usage"]["output_tokens"]) == ("length", 60)
        assert result["model"]["id"] == MODEL
    letters = {headers["nanovllm_job_id"]: headers for headers, _ in await bench.dead_letters(len(refused))}
    assert {job: letter["nanovllm_code"] for job, letter in letters.items()} == {
        "long": "prompt_too_long",
        "several": "invalid_input",
        "regex": "unsupported_constraint",
        "picture": "invalid_input",
    }
    assert seen["nanovllm_jobs_total", ("result",)] == len(jobs)
    assert seen["nanovllm_jobs_total", ("dead_letter",)] == len(refused)
    assert seen["nanovllm_endpoint_up", (server.url,)] == 1
    assert seen["nanovllm_endpoint_requests_total", (server.url,)] > len(jobs)
    assert sum(value for (name, _), value in seen.items() if name == "nanovllm_endpoint_faults_total") > 0
    assert seen["nanovllm_generation_tokens_total", ()] >= 60 * len(plain)
