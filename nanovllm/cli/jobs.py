"""``nanovllm submit`` and ``nanovllm results``, and the options that all commands with brokers share."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nanovllm.cli.journal import Journal
from nanovllm.cli.sending import Sent, finder_of, forbidden_uris, listing_of, send_all
from nanovllm.cli.sources import Submission, plan_submissions
from nanovllm.client.producer import JobKey, JobProducer
from nanovllm.client.results import ResultReader
from nanovllm.client.upload import ImageUploader
from nanovllm.errors import AnswersMissing, InvalidInput, counted
from nanovllm.messages.result import Result
from nanovllm.pipeline.routing.routes import load_routes
from nanovllm.settings.loading import CONFIG_VARIABLE, load_settings
from nanovllm.settings.worker import Settings
from nanovllm.terminal import plain, print_json

if TYPE_CHECKING:
    from nanovllm.cli.tables import ResultRows

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", envvar=CONFIG_VARIABLE, help="YAML or TOML file of settings.")
]
BrokersOption = Annotated[
    str | None, typer.Option("--bootstrap-servers", "-b", help="Brokers, over the settings' own.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON in place of a table.")]


def submit(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Images, directories, globs, s3:// URIs of objects, of prefixes (s3://bucket/prefix/) and globs, or "
            ".jsonl files of whole jobs (- reads them from stdin)."
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text; <|image|> marks an image's place.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the prompt.")] = None,
    topic: Annotated[
        str | None, typer.Option(help="One of topics.lanes, for jobs of its priority; topics.jobs if unset.")
    ] = None,
    key: Annotated[JobKey, typer.Option(help="Record key; image: equal images meet one worker's cache.")] = "image",
    upload: Annotated[str | None, typer.Option(help="s3://bucket/prefix that every local image is put below.")] = None,
    format: Annotated[Literal["json", "msgpack"], typer.Option(help="Encoding of the jobs.")] = "json",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of each answer.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many jobs and bytes, and send nothing.")] = False,
    journal: Annotated[
        Path | None,
        typer.Option(help="File that remembers what was sent: the same command again goes on where it stopped."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the answers and print them.")] = False,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to --wait.")] = 300.0,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    bootstrap_servers: BrokersOption = None,
) -> None:
    """Send jobs: one for each image, or those of a file.

    A prompt with several <|image|> takes so many images a job; one without any gets one added at its end.
    """
    settings = client_settings(config, bootstrap_servers)
    topic = topic or settings.topics.jobs
    if topic not in settings.topics.job_topics:
        raise InvalidInput(f"no worker of these settings reads jobs from {topic}: topics.lanes does not name it")
    sampling = {} if max_tokens is None else {"max_tokens": max_tokens}
    lister, finder = listing_of(settings.s3), finder_of(settings.s3)
    text = _read_prompt(prompt, prompt_file)
    submissions = plan_submissions(sources or [], text, sampling, lister, finder, settings.http_images)
    uploader = ImageUploader(upload, settings.s3) if upload else None
    if forbidden := forbidden_uris(settings.s3, submissions, uploader):
        more = f", nor {len(forbidden) - 1:,} more" if len(forbidden) > 1 else ""
        what = f"s3.allow of these settings does not list {forbidden[0]}{more}"
        print(
            plain(f"{what}: a worker with them makes dead letters of such jobs (forbidden_uri)").plain, file=sys.stderr
        )
    with Journal(journal) as sent_before:
        if dry_run:
            _show_plan(submissions, sent_before, as_json)
            return
        producer = JobProducer(settings.kafka, topic=topic, key=key, fmt=format, upload=upload, s3=settings.s3)
        send = partial(_send, producer, submissions, sent_before, uploader, as_json)
        failed = asyncio.run(_submit(settings, topic, send, timeout if wait else None, as_json))
    raise typer.Exit(1 if failed else 0)


def results(
    from_beginning: Annotated[
        bool, typer.Option("--from-beginning", help="Also those that are there already.")
    ] = False,
    count: Annotated[int | None, typer.Option("--count", "-n", min=1, help="Stop after so many.")] = None,
    dead_letters: Annotated[bool, typer.Option("--dead-letters", help="Dead letters too.")] = False,
    topic: Annotated[
        list[str] | None,
        typer.Option(help="More topics of results; unset: those of the routes, where documents.routes names a file."),
    ] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    bootstrap_servers: BrokersOption = None,
) -> None:
    """Follow the results, and the records of documents among them, as they come; Ctrl-C ends it."""
    from nanovllm.cli.tables import ResultRows

    settings = client_settings(config, bootstrap_servers)
    routes = settings.documents.routes
    topics = topic or ([] if routes is None else load_routes(routes).topics)
    reader = ResultReader(
        settings, from_beginning=from_beginning, dead_letters=dead_letters, documents=True, topics=topics
    )
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_follow(reader, ResultRows(as_json=as_json), count))


def client_settings(config: Path | None, bootstrap_servers: str | None, **sections: dict[str, Any]) -> Settings:
    """The settings, with ``bootstrap_servers`` and ``sections`` over them."""
    kafka = {"kafka": {"bootstrap_servers": bootstrap_servers}} if bootstrap_servers else {}
    return load_settings(config, kafka | sections)


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str | None:
    if prompt is not None and prompt_file is not None:
        raise InvalidInput("give --prompt or --prompt-file, not both")
    if prompt_file is None:
        return prompt
    try:
        # A file ends with a line end; the prompt does not.
        return prompt_file.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InvalidInput(f"the prompt file {prompt_file} cannot be read: {reason}") from None


def _show_plan(submissions: list[Submission], journal: Journal, as_json: bool) -> None:
    left = [one for one in submissions if not journal.passes_over(one.fingerprint)]
    sizes = [one.image_bytes for one in left]
    known = [size for size in sizes if size is not None]
    images = sum(len(one.images if one.job is None else one.job.images) for one in left)
    before, unknown = len(submissions) - len(left), len(sizes) - len(known)
    if as_json:
        print_json(
            {"jobs": len(left), "images": images, "bytes": sum(known), "unknown_sizes": unknown, "sent_before": before}
        )
        return
    from rich.filesize import decimal

    size = f" ({decimal(sum(known))})" if known else ""
    print(f"{counted(len(left), 'job')}, {counted(images, 'image')}, {sum(known):,} bytes{size}")
    if unknown:
        print(f"not counted: the bytes of {counted(unknown, 'job')} with objects of unknown size")
    if before:
        print(f"{counted(before, 'job')} were sent before")


async def _submit(
    settings: Settings, topic: str, send: Callable[[], Coroutine[Any, Any, Sent]], wait_s: float | None, as_json: bool
) -> bool:
    """Send everything, wait where asked; whether something failed or did not come."""
    if wait_s is None:
        return (await send()).is_interrupted
    from nanovllm.cli.tables import ResultRows

    # Before the first job is sent, so that no answer can be missed.
    async with ResultReader(settings, dead_letters=True) as reader:
        sent = await send()
        if sent.is_interrupted:
            return True
        missing, rows = set(sent.job_ids), ResultRows(as_json=as_json)
        is_failed = await _wait_for(reader, missing, rows, wait_s)
    if missing:
        group = settings.kafka.group_id
        raise AnswersMissing(
            f"{counted(len(missing), 'answer')} did not come within {wait_s:g} s. Look whether a worker runs in group "
            f"{group}, reads {topic} and writes {settings.topics.results}: its log and /readyz say what it waits for"
        )
    return is_failed


async def _send(
    producer: JobProducer,
    submissions: list[Submission],
    journal: Journal,
    uploader: ImageUploader | None,
    as_json: bool,
) -> Sent:
    async with producer:
        sent = await send_all(producer, submissions, journal, uploader)
    if as_json:
        uploads = {"uploads": sent.uploads} if uploader else {}
        print_json({"topic": producer.topic, "jobs": len(sent.job_ids), "job_ids": sent.job_ids, **uploads})
    else:
        for path, uri in sent.uploads.items():
            print(plain(f"{path} uploaded to {uri}").plain, file=sys.stderr)
        before = f", {sent.before:,} were sent before" if sent.before else ""
        print(f"{counted(len(sent.job_ids), 'job')} sent to {producer.topic}{before}", file=sys.stderr)
        for job_id in sent.job_ids:
            print(plain(job_id).plain)
    if sent.failure is not None:
        raise sent.failure
    if sent.is_interrupted:
        left = len(submissions) - sent.before - len(sent.job_ids)
        how = "the same command with --journal FILE would go on from here"
        print(
            f"interrupted: {counted(left, 'job')} not sent; {'run it again' if journal.has_file else how}",
            file=sys.stderr,
        )
    return sent


async def _wait_for(reader: ResultReader, missing: set[str], rows: ResultRows, wait_s: float) -> bool:
    """Show outcomes and take them from ``missing``, for ``wait_s`` at most; whether one is a dead letter."""
    deadline = time.monotonic() + wait_s
    failed = False
    while missing and time.monotonic() <= deadline:
        for outcome in await reader.read():
            if outcome.job_id in missing:
                missing.discard(outcome.job_id)
                failed = failed or not isinstance(outcome, Result)
                rows.show(outcome)
    return failed


async def _follow(reader: ResultReader, rows: ResultRows, count: int | None) -> None:
    shown = 0
    async with reader:
        while count is None or shown < count:
            for outcome in (await reader.read())[: None if count is None else count - shown]:
                rows.show(outcome)
                shown += 1
