"""Sources of ``nanovllm submit``: images, globs, URIs and job files, as jobs."""

from __future__ import annotations

import asyncio
import glob
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovllm.client.producer import JobProducer
from nanovllm.errors import InvalidInput, InvalidJob, counted
from nanovllm.messages.codec import decode_job
from nanovllm.messages.job import IMAGE_PLACEHOLDER, Job

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
JOB_SUFFIXES = frozenset({".jsonl", ".ndjson"})
MAX_IN_FLIGHT = 64


@dataclass(frozen=True)
class Submission:
    """One job that is to be sent; local images are still paths, read when their turn comes."""

    job: Job | None = None
    prompt: str = ""
    images: tuple[str | Path, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)


def plan_submissions(sources: Sequence[str], prompt: str | None, sampling: dict[str, Any]) -> list[Submission]:
    """The jobs that ``sources`` and ``prompt`` ask for.

    A source is an image, a directory of images, a glob, an ``s3://`` URI, or a file of JSON lines (``-``: standard
    input) whose lines are whole jobs. Each image becomes a job with ``prompt``; a prompt with several ``<|image|>``
    takes as many images a job, one without any gets one at its end. No source at all: one job of text.

    Raises:
        InvalidInput: a source that is not there, images without a prompt, a number of images that does not go up.
        InvalidJob: a line that is no job, named by its file and number.
    """
    jobs = [Submission(job=job) for source in sources if _is_job_file(source) for job in _read_jobs(source)]
    images = [image for source in sources if not _is_job_file(source) for image in _expand(source)]
    if not sources:
        if not prompt:
            raise InvalidInput("nothing to send: name images, a .jsonl file of jobs, or a --prompt")
        return [Submission(prompt=prompt, sampling=sampling)]
    if not images:
        return jobs
    if not prompt:
        raise InvalidInput("images need a --prompt or a --prompt-file")
    if IMAGE_PLACEHOLDER not in prompt:
        prompt = f"{prompt} {IMAGE_PLACEHOLDER}"
    places = prompt.count(IMAGE_PLACEHOLDER)
    if len(images) % places:
        raise InvalidInput(
            f"the prompt has {counted(places, 'image placeholder')}; "
            f"{counted(len(images), 'image')} cannot be dealt out evenly"
        )
    groups = (tuple(images[start : start + places]) for start in range(0, len(images), places))
    return jobs + [Submission(prompt=prompt, images=group, sampling=sampling) for group in groups]


async def send_all(producer: JobProducer, submissions: Sequence[Submission]) -> AsyncIterator[str]:
    """Send ``submissions``, some at a time; yields each job's id, in their order, when all replicas have it.

    Raises what ``JobProducer.send`` raises, after the ids of those that were sent beside the one that failed.
    """
    for start in range(0, len(submissions), MAX_IN_FLIGHT):
        window = (_send(producer, submission) for submission in submissions[start : start + MAX_IN_FLIGHT])
        outcomes = await asyncio.gather(*window, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, str):
                yield outcome
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome


async def _send(producer: JobProducer, submission: Submission) -> str:
    if submission.job is not None:
        return await producer.send_job(submission.job)
    return await producer.send(submission.prompt, images=submission.images, sampling=submission.sampling)


def _is_job_file(source: str) -> bool:
    return source == "-" or Path(source).suffix.lower() in JOB_SUFFIXES


def _read_jobs(source: str) -> Iterator[Job]:
    try:
        lines = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise InvalidInput(f"{source} cannot be read: {error.strerror or type(error).__name__}") from None
    # Only \n ends a line of JSON; splitlines() would also cut at characters that may stand inside a string.
    for number, line in enumerate(lines.split(b"\n"), start=1):
        if line.strip():
            try:
                yield decode_job(line.strip())
            except InvalidJob as error:
                raise InvalidJob(f"{source}, line {number}: {error}") from None


def _expand(source: str) -> list[str | Path]:
    if "://" in source:
        if not source.startswith("s3://"):
            raise InvalidInput("only s3:// URIs can be sent; download what lies elsewhere, or put it into S3")
        if source.endswith("/"):
            raise InvalidInput(f"{source} names a prefix; name the objects, one by one or in a .jsonl file of jobs")
        return [source]
    path = Path(source)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    elif path.exists():
        found = [path]
    else:
        found = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
    if not found:
        raise InvalidInput(f"{source}: no such file, and no images are found there")
    return list(found)
