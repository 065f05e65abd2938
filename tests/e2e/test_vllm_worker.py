"""Workers over a real vLLM, its server or in process: Apache Kafka, S3, images, a constraint, dead letters."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from engine_parts import noise_image
from parts import S3Part, eventually
from vllm_parts import CONTEXT, LOAD_S, MAX_IMAGES, VllmServer, make_small_vl, vllm_environment, vllm_python
from world import World

from nanovllm.messages.job import Job

pytestmark = [
    pytest.mark.vllm, pytest.mark.proof, pytest.mark.kafka, pytest.mark.s3, pytest.mark.timeout(2400)
]  # fmt: skip

SCHEMA = {
    "type": "object",
    "properties": {"total": {"enum": ["18.40", "9.99"]}, "paid": {"type": "boolean"}},
    "required": ["total", "paid"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_vl(tmp_path_factory.mktemp("vl"))


def jobs(world: World) -> list[dict[str, Any]]:
    """Greedy jobs: four that can be answered, and two that cannot."""
    uris = []
    for number, size in enumerate(((64, 64), (64, 128))):
        buffer = io.BytesIO()
        noise_image(number, *size).save(buffer, "PNG")
        uris.append(world.s3.put(world.bucket, f"{number}.png", buffer.getvalue()))
    short = {"temperature": 0.0, "max_tokens": 16}
    return [
        {"job_id": "text", "prompt": "What is the total?", "sampling": short},
        {"job_id": "one", "prompt": "Describe <|image|>", "images": uris[:1], "sampling": short},
        {"job_id": "two", "prompt": "Compare <|image|> and <|image|>", "images": uris,
         "sampling": short | {"logprobs": 2}},
        {"job_id": "guided", "prompt": "<|image|>", "images": uris[1:],
         "sampling": short | {"json_schema": SCHEMA, "max_tokens": 200}},
        {"job_id": "schema", "prompt": "hello", "sampling": short | {"json_schema": {"type": "nonsense"}}},
        {"job_id": "hot", "prompt": "hello", "sampling": {"temperature": 50.0}},
    ]  # fmt: skip


async def outcomes(world: World, answerable: int, dead: int, python: str | Path | None = None) -> None:
    """Send the jobs, and work until nothing is left."""
    await world.create_topics()
    async with world.producer() as producer:
        for job in jobs(world):
            await producer.send_job(Job.model_validate(job))
    process = {"python": python} if python is not None else {}
    worker = world.worker("worker", "--exit-when-drained", **process)
    worker.start()
    try:
        await eventually(lambda: not worker.is_running, within_s=LOAD_S, why="the worker goes on")
    finally:
        worker.kill()
    assert worker.exit_code == 0, worker.tail(60)
    deadline = time.monotonic() + 120
    async with world.reader() as reader:
        while len(world.results) < answerable or len(world.dead_letters) < dead:
            await world.read(reader)
            assert time.monotonic() < deadline, f"{[*world.results]}, dead {world.dead_letters}"


@pytest.mark.parametrize("backend", ["openai", "vllm"])
async def test_jobs_through_kafka_and_s3_are_answered_as_by_the_native_engine(
    backend: str,
    checkpoint: Path,
    kafka_broker: str,
    versity_s3: S3Part,
    tmp_path: Path,
) -> None:
    python, common = vllm_python(), {"NANOVLLM_ENGINE__MAX_NUM_SEQS": "8"}
    local = common | {
        "NANOVLLM_ENGINE__MODEL": str(checkpoint),
        "NANOVLLM_ENGINE__DTYPE": "float32",
        "NANOVLLM_ENGINE__MAX_MODEL_LEN": str(CONTEXT),
    }
    server = VllmServer(python, checkpoint, tmp_path / "vllm.log")
    if backend == "openai":
        await server.start()
        settings = common | {"NANOVLLM_REMOTE__ENDPOINTS": server.url, "NANOVLLM_REMOTE__DIALECT": "vllm"}
        settings |= {"NANOVLLM_ENGINE__MODEL": "tiny"}
    else:
        settings = vllm_environment(python) | local | {"NANOVLLM_ENGINE__ENFORCE_EAGER": "true"}
        settings |= {"NANOVLLM_ENGINE__MAX_IMAGES_PER_REQUEST": str(MAX_IMAGES)}
    world = World(kafka_broker, versity_s3, tmp_path, settings | {"NANOVLLM_ENGINE__BACKEND": backend})
    try:
        await outcomes(world, 4, 2, python if backend == "vllm" else None)
    finally:
        server.stop()
    own = World(kafka_broker, versity_s3, tmp_path / "own", local | {"NANOVLLM_ENGINE__BACKEND": "native"})
    await outcomes(own, 5, 1)  # it takes any temperature

    results = {job_id: found[0] for job_id, found in world.results.items()}
    expected = {job_id: found[0] for job_id, found in own.results.items()}
    assert {*results} == {"text", "one", "two", "guided"}
    for job_id in ("text", "one", "two"):
        assert results[job_id].token_ids == expected[job_id].token_ids
        # Of a character that max_tokens cuts vLLM's text has nothing, and the native engine's U+FFFD.
        assert results[job_id].text.rstrip("\ufffd") == expected[job_id].text.rstrip("\ufffd")
        assert results[job_id].usage.input_tokens == expected[job_id].usage.input_tokens
        assert results[job_id].usage.output_tokens == expected[job_id].usage.output_tokens
    assert {*json.loads(results["guided"].text)} == {"total", "paid"}
    assert results["guided"].finish_reason == "stop"
    dead = {job_id: letters[0].code for job_id, letters in world.dead_letters.items()}
    assert dead == {
        "schema": "invalid_input" if backend == "openai" else "unsupported_constraint",
        "hot": "invalid_input",
    }
    assert await world.lag() == 0
