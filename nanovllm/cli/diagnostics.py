"""``nanovllm doctor``: the engine's choices, and whether the surroundings that the settings name answer."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from botocore.exceptions import ClientError

from nanovllm.cli.extras import require
from nanovllm.cli.jobs import ConfigOption
from nanovllm.cli.run import engine_settings, require_engine
from nanovllm.errors import NanoVLLMError
from nanovllm.kafka.admin import topic_states
from nanovllm.messages.s3_uri import split_s3_uri
from nanovllm.objects.errors import status_of
from nanovllm.objects.fetch import check_stores
from nanovllm.objects.s3_client import S3Client
from nanovllm.pipeline.documents.model_profile import model_profile, profile_rows
from nanovllm.pipeline.operations.replicas import cores_of_replicas
from nanovllm.settings.worker import Settings
from nanovllm.start_phases import START, Phase
from nanovllm.terminal import Row, long_engine_work, long_work, print_table

PATIENCE_MS = 5_000


def doctor(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Checkpoint directory, alias or cached hub name, over engine.model.")
    ] = None,
    config: ConfigOption = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to measure; 0: only say what was chosen.")] = 10.0,
    check: Annotated[
        bool, typer.Option("--check", help="Exit code 1 where something that a worker needs does not answer.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array instead of a table.")] = False,
) -> None:
    """Say what this machine and checkpoint get, and why: device, attention, weights, memory, profile; and measure it.

    Asks the brokers and the object store too; what does not answer there is a line of the table.
    """
    settings = engine_settings(config, checkpoint)
    check_stores(settings.s3)
    replicas = list(_replicas(settings))
    match settings.engine.backend:
        case "openai":
            rows = _servers(settings)
        case "vllm":
            rows = _vllm(settings)
        case "echo":
            rows = [Row("backend", "echo (engine.backend echo)", "answers are the prompts")]
        case _:
            rows = _engine(settings, seconds)
    rows += [Row(*row) for row in profile_rows(model_profile(settings.engine))]
    rows += replicas
    rows += surroundings(settings)
    print_table(("what", "is", "why"), [row[:3] for row in rows], as_json=as_json)
    if check and any(row.fails for row in rows):
        raise typer.Exit(1)


def _engine(settings: Settings, seconds: float) -> list[Row]:
    """The choices of the engine in this process, and its speed."""
    require("worker", "torch", "transformers", "PIL")
    from nanovllm.pipeline.app import prepare_threads

    START.add(Phase.IMPORTS, START.age_s())  # of the command line
    prepare_threads()
    with long_engine_work("loading and measuring the engine"):
        with START.timed(Phase.IMPORTS):
            from nanovllm.engine.backends.capabilities import SAMPLING_NAMES
            from nanovllm.engine.diagnostics import describe, measure, take_first_token
            from nanovllm.pipeline import build
            from nanovllm.pipeline.documents.model_profile import heeded_sampling
            from nanovllm.pipeline.stages.admit import sampling_defaults

        build.image_limits(settings.images)
        build.begin_digest(settings)
        shares = settings.replicas * settings.engine.cpu_memory_shares
        with build.build_engine(settings.engine.model_copy(update={"cpu_memory_shares": shares})) as engine:
            of_profile = heeded_sampling(model_profile(settings.engine).profile, SAMPLING_NAMES)
            defaults = sampling_defaults(settings, engine.generation_defaults, of_profile)
            first = take_first_token(engine)
            findings = [*describe(engine, defaults), first, *(measure(engine, seconds) if seconds else ())]
    return [Row(finding.subject, finding.value, finding.note) for finding in findings]


def _servers(settings: Settings) -> list[Row]:
    """What each endpoint answers, and what its dialect has."""
    require_engine(settings)
    from nanovllm.pipeline.build_remote import build_remote_engine, remote_findings

    with long_work("asking the endpoints"):
        return asyncio.run(remote_findings(build_remote_engine(settings), settings))


def _vllm(settings: Settings) -> list[Row]:
    """What vLLM would be given."""
    require_engine(settings)
    from nanovllm.pipeline.build import checkpoint_directory
    from nanovllm.pipeline.build_vllm import vllm_findings

    return [Row(*row) for row in vllm_findings(settings, checkpoint_directory(settings.engine))]


def surroundings(settings: Settings) -> Iterator[Row]:
    """What answers of all that a worker with ``settings`` speaks to; nothing is created, and a wait is short."""
    ports = range(settings.http.port, settings.http.port + settings.replicas) if settings.http.port else [0]
    yield from (_port(settings.http.host, port) for port in ports)
    yield from _brokers(settings)
    yield from _stores(settings)


def _replicas(settings: Settings) -> Iterator[Row]:
    """The cores of each replica; raises ConfigurationError where there are too few cores or ports."""
    if settings.replicas == 1:
        return
    sets = [",".join(map(str, cores)) for cores in cores_of_replicas(settings)]
    note = "memory is what one of them has; threads and speeds are those of one process on all cores"
    yield Row("replicas", f"{settings.replicas}, on cores {' | '.join(sets)}", note)


def _port(host: str, port: int) -> Row:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            note = f"{error.strerror}: a worker here, or set NANOVLLM_HTTP__PORT"
            return Row("http port", f"{port} is not free", note)
    return Row("http port", f"{port or 'a free one'} on {host}")


def _brokers(settings: Settings) -> Iterator[Row]:
    from nanovllm.pipeline.build import required_topics
    from nanovllm.pipeline.build_documents import worker_routes

    patience = {"request_timeout_ms": min(PATIENCE_MS, settings.kafka.request_timeout_ms)}
    kafka, names = settings.kafka.model_copy(update=patience), required_topics(settings, worker_routes(settings))
    try:
        states = asyncio.run(topic_states(kafka, names))
    except NanoVLLMError as error:
        yield Row("brokers", "do not answer", error.in_one_line, fails=True)
        return
    yield Row("brokers", f"answer at {kafka.bootstrap_servers}")
    missing = [name for name in names if name not in states]
    note = f"missing: {', '.join(missing)}; nanovllm topics create makes them" if missing else ""
    yield Row("topics", f"{len(names) - len(missing)} of {len(names)} are there", note, fails=bool(missing))


def _stores(settings: Settings) -> Iterator[Row]:
    places = [*settings.s3.allow, *([settings.s3.large_results] if settings.s3.large_results else [])]
    buckets = dict.fromkeys(place[0] for uri in places if (place := split_s3_uri(uri)))
    if not buckets:
        yield Row("object store", "not used", "s3.allow is not set: jobs that name objects become dead letters")
        return
    client = S3Client(settings.s3)
    for bucket in buckets:
        yield _bucket(client, bucket)
    client.close()


def _bucket(client: S3Client, bucket: str) -> Row:
    subject = f"bucket {bucket}"

    def look(s3: Any) -> Row:
        try:
            s3.list_objects_v2(Bucket=bucket, MaxKeys=1)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code == "AccessDenied":
                return Row(subject, "answers", "it may not be listed, which a worker does not need")
            if status_of(error) == 404:
                return Row(subject, "does not exist", "create it, or correct NANOVLLM_S3__ALLOW", fails=True)
            raise
        return Row(subject, "answers")

    try:
        return client.call(look)
    except NanoVLLMError as error:
        return Row(subject, "does not answer", error.in_one_line, fails=True)
