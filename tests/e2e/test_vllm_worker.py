"""Workers over a real vLLM, its server or in process: Apache Kafka, S3, images, documents, dead letters; extraction."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from document_bench import event
from document_files import receipts_pdf
from engine_parts import noise_image
from parts import S3Part, create_topic, eventually, python_process
from vllm_parts import CONTEXT, LOAD_S, MAX_IMAGES, VllmServer, make_small_vl, vllm_environment, vllm_python
from world import PARTITIONS, World, reader_settings

from nanovllm.client.results import ResultReader
from nanovllm.messages.document_record import DocumentRecord
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


def document() -> bytes:
    """A PDF of three pages, each of as many pixels as a multiple of a patch: no engine resizes them."""
    return receipts_pdf([noise_image(number, 224, 224) for number in range(MAX_IMAGES)])


def document_routes(directory: Path, bucket: str) -> Path:
    """Routes of pages one by one, and together."""
    routes = []
    for name, merge, request in (("pages", "per_page", "page"), ("whole", "per_document", "document")):
        routes.append(
            {
                "name": name,
                "match": {"bucket": bucket, "key": f"{name}/*.pdf"},
                "prompt": "What is the total? <|image|>",
                "response_schema": SCHEMA,
                "merge": merge,
                "pages": {"dpi": 72, "request": request},
                "sampling": {"temperature": 0, "max_tokens": 100},
                "sidecar": None,
            }
        )
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "routes.yaml"
    file.write_text(yaml.safe_dump({"version": 1, "routes": routes}))
    return file


def told(record: DocumentRecord) -> dict[str, Any]:
    """What a record says of its document."""
    return record.model_dump(mode="json", include={"status", "value", "route", "constrained"}) | {
        "pages": [page.status for page in record.pages],
        "input_tokens": record.usage.input_tokens,
        "image_tokens": record.usage.image_tokens,
    }


async def send_documents(world: World) -> None:
    """Store a document for each route, and tell the worker of both."""
    await create_topic(world.bootstrap_servers, world.topics.events, partitions=PARTITIONS)
    file = document_routes(world.directory, world.bucket)
    world.worker_settings = world.worker_settings | {"NANOVLLM_DOCUMENTS__ROUTES": str(file)}
    keys = ("pages/a.pdf", "whole/a.pdf")
    for key in keys:
        world.s3.put(world.bucket, key, document())
    value = json.dumps({"Records": [event(world.bucket, key) for key in keys]}).encode()
    async with world.producer() as producer:
        await producer._producer.send_and_wait(world.topics.events, value)


async def records_of(world: World) -> dict[str, dict[str, Any]]:
    """What the records of both documents say, by route."""
    found: dict[str, dict[str, Any]] = {}
    async with ResultReader(reader_settings(world), from_beginning=True, documents=True) as reader:
        deadline = time.monotonic() + 120
        while len(found) < 2:
            read = [one for one in await reader.read() if isinstance(one, DocumentRecord)]
            found |= {one.route.name: told(one) for one in read}
            assert time.monotonic() < deadline, f"{found}"
    return found


async def outcomes(
    world: World, answerable: int, dead: int, python: str | Path | None = None, *, with_documents: bool
) -> None:
    """Send the jobs, and the documents, and work until nothing is left."""
    await world.create_topics()
    if with_documents:
        await send_documents(world)
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
async def test_jobs_and_documents_through_kafka_and_s3_are_answered_as_by_the_native_engine(
    backend: str,
    checkpoint: Path,
    kafka_broker: str,
    versity_s3: S3Part,
    tmp_path: Path,
) -> None:
    python, common = vllm_python(), {"NANOVLLM_ENGINE__MAX_NUM_SEQS": "8"}
    is_in_process = backend == "vllm"  # its JSON has the native engine's white space; that of its server is free
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
        await outcomes(world, 4, 2, python if is_in_process else None, with_documents=is_in_process)
    finally:
        server.stop()
    own = World(kafka_broker, versity_s3, tmp_path / "own", local | {"NANOVLLM_ENGINE__BACKEND": "native"})
    await outcomes(own, 5, 1, with_documents=is_in_process)  # it takes any temperature

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
    if is_in_process:
        assert await world.lag(world.topics.events) == 0
        by_vllm, by_native = await records_of(world), await records_of(own)
        assert by_vllm == by_native
        assert [one["status"] for one in by_vllm.values()] == ["complete", "complete"]


async def test_extract_and_routes_check_by_vllm_are_those_of_the_native_engine(
    checkpoint: Path, tmp_path: Path
) -> None:
    python, routes, source = vllm_python(), document_routes(tmp_path, "inbox"), tmp_path / "a.pdf"
    source.write_bytes(document())
    common = {"NANOVLLM_ENGINE__MODEL": str(checkpoint), "NANOVLLM_ENGINE__DTYPE": "float32"}
    common |= {"NANOVLLM_ENGINE__MAX_MODEL_LEN": str(CONTEXT), "NANOVLLM_ENGINE__MAX_NUM_SEQS": "8"}
    common |= {"NANOVLLM_ENGINE__MAX_IMAGES_PER_REQUEST": "2"}  # two requests for three pages
    vllm = {"NANOVLLM_ENGINE__BACKEND": "vllm", "NANOVLLM_ENGINE__ENFORCE_EAGER": "true"}

    async def run(name: str, *command: str) -> None:
        by_vllm = name.startswith("vllm")
        settings = vllm_environment(python) | common | vllm if by_vllm else common
        process = python_process(
            tmp_path, "-m", "nanovllm.cli.main", *command, settings=settings, name=name,
            **({"python": python} if by_vllm else {}),
        )  # fmt: skip
        process.start()
        try:
            await eventually(lambda: not process.is_running, within_s=LOAD_S, why=f"{name} goes on")
        finally:
            process.kill()
        assert process.exit_code == 0, process.tail(60)

    told_by = {}
    for name in ("native", "vllm"):
        output = tmp_path / f"{name}.jsonl"
        await run(f"{name}-check", "routes", "check", str(routes), "--page", "224x224")
        await run(name, "extract", str(source), "-r", str(routes), "--route", "whole", "-o", str(output))
        checked = (tmp_path / f"{name}-check.log").read_text().splitlines()
        record = DocumentRecord.model_validate_json(output.read_text())
        told_by[name] = told(record), [line for line in checked if line.startswith(("pages", "whole"))]
    assert told_by["vllm"] == told_by["native"]
    record, rows = told_by["vllm"]
    assert (record["status"], record["pages"]) == ("complete", ["ok", "ok", "ok"])
    assert any("up to 2 pages each" in row for row in rows)
