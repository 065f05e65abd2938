"""Sending of ``nanovllm submit``: in windows, with a journal and uploads, ended by Ctrl-C between two windows."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nanovllm.cli.journal import Journal
from nanovllm.cli.sources import Image, Submission
from nanovllm.client.producer import JobImage, JobProducer
from nanovllm.client.upload import ImageUploader
from nanovllm.errors import (
    ForbiddenUri,
    InvalidInput,
    ObjectNotFound,
    PermanentError,
    SystemicError,
    TransientError,
    counted,
)
from nanovllm.messages.job import ImageRef, image_name
from nanovllm.messages.s3_uri import split_object
from nanovllm.objects.fetch import AllowList
from nanovllm.objects.listing import ListedObject, ObjectPattern, find_object, list_objects
from nanovllm.objects.s3_client import S3Client, check_settings
from nanovllm.settings.s3 import S3Settings
from nanovllm.terminal import long_work, plain

MAX_IN_FLIGHT = 64
MAX_ASKED = 8


@dataclass
class Sent:
    """What was sent; ``uploads`` by local path. ``failure`` ended the sending early."""

    job_ids: list[str] = field(default_factory=list)
    uploads: dict[str, str] = field(default_factory=dict)
    before: int = 0
    is_interrupted: bool = False
    failure: BaseException | None = None


async def send_all(
    producer: JobProducer, submissions: Sequence[Submission], journal: Journal, uploader: ImageUploader | None
) -> Sent:
    """Send what the journal does not have, some at a time, in order. With ``uploader`` every local image is uploaded.

    Ctrl-C lets those at work end and sends no more; a second one ends the process.
    """
    sent = Sent()
    left = [one for one in submissions if not journal.passes_over(one.fingerprint)]
    sent.before = len(submissions) - len(left)
    with long_work(f"sending to {producer.topic}", len(left)) as show, _interruption() as interrupted:
        for start in range(0, len(left), MAX_IN_FLIGHT):
            if interrupted.is_set():
                sent.is_interrupted = True
                break
            window = left[start : start + MAX_IN_FLIGHT]
            jobs = (_send(producer, one, uploader, sent.uploads) for one in window)
            outcomes = await asyncio.gather(*jobs, return_exceptions=True)
            for one, outcome in zip(window, outcomes, strict=True):
                if isinstance(outcome, str):
                    journal.record(one.fingerprint, outcome)
                    sent.job_ids.append(outcome)
                elif sent.failure is None:
                    sent.failure = outcome
            if sent.failure is not None:
                break
            show(len(sent.job_ids))
    return sent


def forbidden_uris(s3: S3Settings, submissions: Sequence[Submission], uploader: ImageUploader | None) -> list[str]:
    """What ``s3.allow`` lets no worker with these settings read; where it is not set, the workers' own is not known."""
    if not s3.allow:
        return []
    uris = [uploader.example] if uploader else []
    for one in submissions:
        named = [image.uri for image in one.job.images] if one.job is not None else map(_uri, one.images)
        uris += [uri for uri in named if uri is not None]
    allow = AllowList(s3.allow)
    return [uri for uri in uris if not _is_allowed(allow, uri)]


def _uri(image: Image) -> str | None:
    if isinstance(image, ListedObject):
        return image.uri
    return image if isinstance(image, str) else None


def _is_allowed(allow: AllowList, uri: str) -> bool:
    address = split_object(uri)
    try:
        if address is not None:  # what is no URI is refused as such
            allow.check(address)
    except ForbiddenUri:
        return False
    return True


def listing_of(s3: S3Settings) -> Callable[[ObjectPattern], Iterable[ListedObject]]:
    """What lists the objects of a pattern, and shows how far it is."""

    def list_pattern(pattern: ObjectPattern) -> Iterator[ListedObject]:
        check_settings(s3)
        with long_work(f"listing s3://{pattern.bucket}/{pattern.prefix}"):
            yield from list_objects(s3, pattern)

    return list_pattern


def finder_of(s3: S3Settings) -> Callable[[Sequence[str]], dict[str, ListedObject]]:
    """What asks the store for the objects of URIs, some at a time; those that it does not tell of are left out."""

    def find(uris: Sequence[str]) -> dict[str, ListedObject]:
        client, why, answers = S3Client(s3), "", True

        def ask(uri: str) -> ListedObject | None:
            nonlocal why, answers
            try:
                return find_object(client, uri) if answers else None
            except ObjectNotFound:
                raise InvalidInput(f"{plain(uri).plain}: there is no such object") from None
            except (SystemicError, TransientError, PermanentError) as error:
                why, answers = str(error), isinstance(error, PermanentError)
                return None

        found: dict[str, ListedObject] = {}
        with long_work("asking for the objects' versions", len(uris)) as show, ThreadPoolExecutor(MAX_ASKED) as pool:
            for number, (uri, one) in enumerate(zip(uris, pool.map(ask, uris), strict=True), start=1):
                show(number)
                if one is not None:
                    found[uri] = one
        if why:
            left = counted(len(uris) - len(found), "object")
            print(f"the version of {left} is not known ({why}): the job takes the newest one", file=sys.stderr)
        return found

    return find


async def _send(
    producer: JobProducer, submission: Submission, uploader: ImageUploader | None, uploads: dict[str, str]
) -> str:
    if submission.job is not None:
        return await producer.send_job(submission.job)
    images = [await _job_image(image, uploader, uploads) for image in submission.images]
    return await producer.send(submission.prompt, images=images, sampling=submission.sampling, job_id=submission.job_id)


async def _job_image(image: Image, uploader: ImageUploader | None, uploads: dict[str, str]) -> JobImage:
    if isinstance(image, ListedObject):
        # The version that was listed: the job's id derives from it.
        return ImageRef(uri=image.uri, etag=image.etag)
    if uploader is None or isinstance(image, str):
        return image
    ref = await uploader.upload(await asyncio.to_thread(_read, image), image.name)
    uploads[str(image)] = str(ref.uri)
    return ref.model_copy(update={"name": image_name(str(image))})


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"the image {path} cannot be read: {error.strerror or type(error).__name__}") from None


@contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that the first SIGINT sets; the second one is as it was before."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.getsignal(signal.SIGINT)

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        interrupted.set()

    # Not the event loop's own handlers: they run some iterations later, and a window would be sent in between.
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
