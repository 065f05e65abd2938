"""The same jobs on every backend, through worker processes, Kafka and S3, with the shipped checkpoint in float32."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from aiokafka import AIOKafkaProducer
from backend_jobs import (
    BEYOND_THE_PROTOCOL,
    CHOICES,
    GUIDED,
    MALFORMED,
    MAX_BYTES,
    MAX_IMAGES,
    MAX_PIXELS,
    answered_jobs,
    faulty_jobs,
    file_of,
    questions,
    record_of,
)
from document_bench import event
from document_files import SCHEMA, drawn, receipts_pdf, receipts_route
from document_world import committed_in
from generic_parts import needs_release
from openai_server_program import MODEL
from parts import S3Part, create_topic, eventually, has_s3_node, python_process
from world import PARTITIONS, World, reader_settings

from nanovllm.client.results import ResultReader
from nanovllm.demo.child_process import LocalProcess, free_port
from nanovllm.kafka.client import producer_kwargs
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.messages.job import Job
from nanovllm.messages.job_metrics import JobMetrics
from nanovllm.messages.result import Result, TokenLogprobs

pytestmark = [pytest.mark.kafka, needs_release]

BACKENDS = ("native", "generic", "openai")
SERVER = Path(__file__).resolve().parents[1] / "openai_server_program.py"
READ_S = 100.0
IMAGE_TOKENS = 49
PAGES = 3
LOAD, IMAGES_OF_LOAD = 120, 8

Settings = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Jobs:
    """Values of records, by the ids of their jobs, and the codes of those that are at fault on every backend."""

    bucket: str
    records: dict[str, bytes]
    codes: dict[str, str]


@dataclass(frozen=True)
class Run:
    """What became of the jobs on one backend: one result or dead letter each, by its id."""

    backend: str
    results: dict[str, Result]
    dead_letters: dict[str, DeadLetter]
    metrics: dict[str, JobMetrics]
    documents: list[DocumentRecord]


@pytest.fixture(scope="module")
def store(request: pytest.FixtureRequest) -> S3Part:
    """A real S3 server where there is one, else moto's."""
    if has_s3_node():
        return request.getfixturevalue("versity_node").part
    return S3Part(request.getfixturevalue("moto_endpoint"), "test", "testsecret")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a process that serves the checkpoint by OpenAI's protocol."""
    port = free_port()
    process = python_process(tmp_path_factory.mktemp("server"), str(SERVER), str(port), settings={}, name="server")
    url = f"http://127.0.0.1:{port}/v1"

    def answers() -> bool:
        assert process.is_running, process.tail(30)
        try:
            return bool(urllib.request.urlopen(f"{url}/models", timeout=5))
        except OSError:
            return False

    process.start()
    try:
        asyncio.run(eventually(answers))
        yield url
    finally:
        process.kill()


@pytest.fixture(scope="module")
def settings(server: str) -> Settings:
    """Settings of workers, by backend."""
    common = {
        "NANOVLLM_ENGINE__MAX_NUM_SEQS": "16",
        "NANOVLLM_ENGINE__MAX_IMAGES_PER_REQUEST": str(MAX_IMAGES),
        "NANOVLLM_IMAGES__MAX_BYTES": str(MAX_BYTES),
        "NANOVLLM_IMAGES__MAX_PIXELS": str(MAX_PIXELS),
        "NANOVLLM_SAMPLING__MAX_TOKENS": "96",
        "NANOVLLM_KAFKA__SESSION_TIMEOUT_MS": "3000",
        "NANOVLLM_KAFKA__HEARTBEAT_INTERVAL_MS": "500",
        "OMP_NUM_THREADS": "1",
    }
    own = {
        "native": {"NANOVLLM_ENGINE__DTYPE": "float32"},
        "generic": {"NANOVLLM_ENGINE__DTYPE": "float32"},
        "openai": {
            "NANOVLLM_ENGINE__MODEL": MODEL,
            "NANOVLLM_REMOTE__ENDPOINTS": server,
            "NANOVLLM_REMOTE__DIALECT": "vllm",
            "NANOVLLM_REMOTE__REVISION": "as-served",
        },
    }
    return {backend: {"NANOVLLM_ENGINE__BACKEND": backend, **common, **own[backend]} for backend in BACKENDS}


@pytest.fixture(scope="module")
def jobs(store: S3Part) -> Jobs:
    bucket = store.make_bucket()
    answered = answered_jobs(store, bucket)
    faulty = faulty_jobs(store, bucket, answered["question-0"]["images"][0])
    own = {name: {"prompt": "Say", "sampling": sampling} for name, sampling in BEYOND_THE_PROTOCOL.items()}
    all_jobs = {**answered, **own, **{job_id: job for job_id, (job, _) in faulty.items()}}
    records = {job_id: record_of(job_id, job) for job_id, job in all_jobs.items()} | {MALFORMED: b"\x93not a job"}
    codes = {job_id: code for job_id, (_, code) in faulty.items()} | {MALFORMED: "invalid_job"}
    return Jobs(bucket, records, codes)


@dataclass(frozen=True)
class Place:
    """Where the workers run."""

    bootstrap_servers: str
    store: S3Part
    settings: Settings
    directories: pytest.TempPathFactory

    def world(self, directory: Path, backend: str, **settings: str) -> World:
        """Topics and a bucket of their own; the workers have a narrow window, so that faults fall into their work."""
        own = {**self.settings[backend], "NANOVLLM_ADMISSION__MAX_JOBS": "8", **settings}
        return World(self.bootstrap_servers, self.store, directory, own)

    def run(self, backend: str, jobs: Jobs) -> Run:
        """One worker process has all jobs together, and ends when nothing is left."""
        directory, own = self.directories.mktemp(backend), dict(self.settings[backend])
        world = World(self.bootstrap_servers, self.store, directory, own, bucket=jobs.bucket)
        return asyncio.run(run_jobs(world, backend, jobs))


@pytest.fixture(scope="module")
def place(kafka_broker: str, store: S3Part, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(kafka_broker, store, settings, tmp_path_factory)


@pytest.fixture(scope="module")
def native(place: Place, jobs: Jobs) -> Run:
    """The jobs on the native engine."""
    return place.run("native", jobs)


@pytest.fixture(scope="module", params=BACKENDS)
def run(request: pytest.FixtureRequest, place: Place, jobs: Jobs, native: Run) -> Run:
    """The jobs on each backend in turn."""
    return native if request.param == "native" else place.run(request.param, jobs)


async def run_jobs(world: World, backend: str, jobs: Jobs) -> Run:
    await world.create_topics()
    expected = len(jobs.records) + 1
    async with AIOKafkaProducer(**producer_kwargs(world.kafka)) as producer:
        for job_id, value in jobs.records.items():
            await producer.send_and_wait(world.topics.jobs, value, key=job_id.encode())
        await put_document(world, producer, f"in/{backend}.pdf")
    await world.drain("worker")
    results: dict[str, Result] = {}
    dead_letters: dict[str, DeadLetter] = {}
    documents: list[DocumentRecord] = []
    reader = ResultReader(reader_settings(world), from_beginning=True, dead_letters=True, documents=True)
    async with reader, asyncio.timeout(READ_S):
        while len(results) + len(dead_letters) + len(documents) < expected:
            for outcome in await reader.read():
                if isinstance(outcome, DocumentRecord):
                    documents.append(outcome)
                elif isinstance(outcome, Result):
                    assert results.setdefault(outcome.job_id, outcome) is outcome
                else:
                    job_id = outcome.job_id if outcome.job_id in jobs.records else MALFORMED
                    assert dead_letters.setdefault(job_id, outcome) is outcome
    metrics = await committed_in(world.bootstrap_servers, world.topics.metrics)
    by_job = {one.key.decode(): JobMetrics.model_validate_json(one.value) for one in metrics}
    return Run(backend, results, dead_letters, by_job, documents)


async def put_document(world: World, producer: AIOKafkaProducer, key: str) -> None:
    """A document of receipts, its event, and a route for it."""
    world.s3.put(world.bucket, key, receipts_pdf([receipt.image for receipt in drawn(PAGES)]))
    await create_topic(world.bootstrap_servers, world.topics.events, partitions=PARTITIONS)
    await producer.send_and_wait(world.topics.events, json.dumps(event(world.bucket, key)).encode())
    routes = world.directory / "routes.yaml"
    # In their order: the model writes the fields as it was trained to.
    routes.write_text(yaml.safe_dump({"version": 1, "routes": [receipts_route(world.bucket)]}, sort_keys=False))
    world.worker_settings["NANOVLLM_DOCUMENTS__ROUTES"] = str(routes)


def answer_of(result: Result) -> dict[str, Any]:
    """All of a result that depends neither on what a backend keeps nor on time."""
    measured = {"usage", "model", "timings_ms", "source", "logprobs", "prompt_logprobs", "reused"}
    dumped = result.model_dump(exclude=measured)
    counts = {"input_tokens": result.usage.input_tokens, "output_tokens": result.usage.output_tokens}
    return dumped | counts | {"inputs": [(one.uri, one.sha256, one.width, one.height) for one in result.inputs]}


def test_texts_tokens_and_counts_of_a_mixed_batch_are_the_same(run: Run, native: Run) -> None:
    wanted = {job_id: answer_of(result) for job_id, result in native.results.items()}
    if run.backend == "openai":
        wanted = {job_id: answer for job_id, answer in wanted.items() if job_id not in BEYOND_THE_PROTOCOL}
    assert {job_id: answer_of(result) for job_id, result in run.results.items()} == wanted
    right = [run.results[f"question-{number}"].text == one.answer for number, one in enumerate(questions())]
    assert sum(right) >= 0.75 * len(right)


def test_a_result_has_what_its_job_asks_for(run: Run) -> None:
    results = run.results
    plain, kept, several = results["plain"], results["stop-kept"], results["several"].outputs or ()
    assert plain.text == results["chat"].text == results["inside"].text
    assert (f"{results['stopped'].text}.", plain.text[: len(kept.text)]) == (kept.text, kept.text)
    assert (results["cut"].status, results["cut"].finish_reason) == ("incomplete", "length")
    assert len({one.text for one in several}) == 3
    assert {results["reused-1"].reused, results["reused-2"].reused} in ({None, "hit"}, {None, "joined"})


def test_log_probabilities_are_those_of_the_native_engine(run: Run, native: Run) -> None:
    job, its = run.results["logprobs"], native.results["logprobs"]
    assert len(job.logprobs or ()) == job.usage.output_tokens > 0
    assert_near(job.logprobs, its.logprobs)
    if run.backend != "openai":
        job, its = run.results["prompt_logprobs"], native.results["prompt_logprobs"]
        assert len(job.prompt_logprobs or ()) == job.usage.input_tokens > 0
        assert_near(job.prompt_logprobs, its.prompt_logprobs)


def assert_near(found: Sequence[TokenLogprobs] | None, wanted: Sequence[TokenLogprobs] | None) -> None:
    mine, its = ([one for place in places or () for one in place] for places in (found, wanted))
    assert [(one.text, one.rank) for one in mine] == [(one.text, one.rank) for one in its]
    assert [one.logprob for one in mine] == pytest.approx([one.logprob for one in its], abs=1e-3)


def test_guided_texts_are_valid_and_said_to_be_constrained(run: Run) -> None:
    results = run.results
    assert [results[kind].constrained for kind in GUIDED] == [True] * len(GUIDED)
    assert jsonschema_rs.validator_for(SCHEMA).is_valid(json.loads(results["json_schema"].text))
    assert re.fullmatch(GUIDED["regex"]["regex"], results["regex"].text)
    assert results["choice"].text in CHOICES
    assert re.fullmatch("TOTAL [0-9]{2}", results["grammar"].text)


def test_a_job_at_fault_is_a_dead_letter_of_the_same_code_and_stage(run: Run, native: Run, jobs: Jobs) -> None:
    codes = jobs.codes
    if run.backend == "openai":
        # A server says that it refuses a request, and not of what kind its fault is.
        codes = codes | {"expression": "invalid_input"} | dict.fromkeys(BEYOND_THE_PROTOCOL, "invalid_input")
        assert all(name in run.dead_letters[name].message for name in BEYOND_THE_PROTOCOL)
    assert {job_id: letter.code for job_id, letter in run.dead_letters.items()} == codes
    for job_id, letter in native.dead_letters.items():
        found = run.dead_letters[job_id]
        assert (found.stage, found.error_class, found.attempts) == (letter.stage, letter.error_class, letter.attempts)


def test_a_result_names_its_model_and_has_timings_and_metrics(run: Run, native: Run) -> None:
    (model,) = {(one.model.id, one.model.revision, one.model.parameter_digest) for one in run.results.values()}
    digest = native.results["plain"].model.parameter_digest
    assert model == ((MODEL, "as-served", "unknown") if run.backend == "openai" else (MODEL, digest[:12], digest))
    for job_id, result in run.results.items():
        timings, metrics = result.timings_ms, run.metrics[job_id]
        assert result.reused or 0 < timings.time_to_first_token <= timings.total
        counts = metrics.num_prompt_tokens, metrics.num_generation_tokens
        assert counts == (result.usage.input_tokens, result.usage.output_tokens)


def test_an_image_is_embedded_once_in_the_worker_and_sent_to_a_server_each_time(run: Run) -> None:
    results = [result for result in run.results.values() if result.reused is None]
    uses = Counter(use.sha256 for result in results for use in result.inputs)
    missed = Counter(use.sha256 for result in results for use in result.inputs if use.cache == "miss")
    image_tokens = {result.usage.image_tokens for result in results if len(result.inputs) == 1}
    is_remote = run.backend == "openai"
    assert max(uses.values()) > 1
    assert missed == (uses if is_remote else dict.fromkeys(uses, 1))
    # As from vLLM: a server counts what its prefix cache had, and does not tell which tokens are an image's.
    assert image_tokens == {0 if is_remote else IMAGE_TOKENS}
    assert max(result.usage.cached_tokens for result in results) > 0


def test_a_document_becomes_a_record(run: Run, native: Run) -> None:
    ((record,), (wanted,)) = run.documents, native.documents
    assert (record.status, record.constrained, len(record.pages)) == ("complete", True, PAGES)
    assert record.value == wanted.value
    pages = zip(record.value, drawn(PAGES), strict=True)
    right = [found[name] == value for found, one in pages for name, value in one.fields.items()]
    assert sum(right) >= 0.75 * len(right)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_worker_told_to_stop_ends_its_jobs_and_commits_them(place: Place, tmp_path: Path, backend: str) -> None:
    world = place.world(tmp_path, backend)
    await world.create_topics()
    await send_load(world)
    worker = world.worker("worker")
    async with world.reader() as reader:
        try:
            await work_until(world, reader, worker)
            assert await asyncio.to_thread(worker.stop, 60.0) == 0, worker.tail(30)
        finally:
            worker.kill()
        await read_all(world, reader)
    assert set(map(len, world.results.values())) == {1}
    assert not world.dead_letters
    assert await world.lag() == LOAD - len(world.results) > 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_no_job_is_lost_by_a_worker_that_is_killed(
    place: Place, tmp_path: Path, backend: str, delivery: str
) -> None:
    world = place.world(tmp_path, backend, NANOVLLM_DELIVERY=delivery)
    await world.create_topics()
    images = await send_load(world)
    killed = world.worker("killed")
    async with world.reader() as reader:
        try:
            await work_until(world, reader, killed)
        finally:
            killed.kill()
        await read_all(world, reader)
        assert len(world.results) < LOAD, "the kill came too late to be one in the middle"
        await world.drain("second")
        async with asyncio.timeout(READ_S):
            while len(world.results) < LOAD:
                await world.read(reader)
        await read_all(world, reader)
    assert world.results.keys() == images.keys()
    assert not world.dead_letters
    assert await world.lag() == 0
    if delivery == "exactly_once":
        assert set(map(len, world.results.values())) == {1}
    texts = defaultdict(set)
    for job_id, results in world.results.items():
        assert len({result.result_id for result in results}) == 1
        texts[images[job_id]].update(result.text for result in results)
    assert set(map(len, texts.values())) == {1}, "an image has one text, whichever worker reads it"


async def send_load(world: World) -> dict[str, str]:
    """Jobs about a few images in turn; returns the image of each, by its id."""
    pictures = [one.images[0] for one in questions()[:IMAGES_OF_LOAD]]
    uris = [world.s3.put(world.bucket, f"{number}.png", file_of(one)) for number, one in enumerate(pictures)]
    images = {f"job-{number:03d}": uris[number % IMAGES_OF_LOAD] for number in range(LOAD)}
    async with world.producer() as producer:
        for job_id, uri in images.items():
            await producer.send_job(Job(job_id=job_id, prompt="Extract the fields as JSON: <|image|>", images=(uri,)))
    return images


async def work_until(world: World, reader: ResultReader, worker: LocalProcess, results: int = 40) -> None:
    """Start ``worker``, and return when so many jobs have a result."""
    worker.start()
    async with asyncio.timeout(READ_S):
        while len(world.results) < results:
            assert worker.is_running, worker.tail(30)
            await world.read(reader)


async def read_all(world: World, reader: ResultReader) -> None:
    """Read until nothing has come for a while."""
    before = -1
    while before != (before := sum(map(len, world.results.values()))):
        await world.read(reader)
