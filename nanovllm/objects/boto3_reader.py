"""The reader of objects in S3 by boto3."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from botocore.exceptions import ClientError

from nanovllm.errors import FetchFailed, NanoVLLMError, ObjectChanged, StoreUnreachable
from nanovllm.messages.job import ImageRef
from nanovllm.objects.daemon_threads import DaemonThreads
from nanovllm.objects.errors import classify, no_entity_tag, status_of
from nanovllm.objects.reader import PROBE_KEY, FetchedImage, ObjectHead, SizeLimit, confirmed, needs_probe
from nanovllm.objects.s3_client import S3Client, make_reading_client
from nanovllm.objects.versions import lasting_version
from nanovllm.settings.s3 import S3Settings

CHUNK_BYTES = 256 * 1024


class Boto3Reader:
    """Reads objects with boto3 in threads of its own: the SDK blocks, and the event loop must not.

    The SDK's own retries are off, because the worker's are counted, backed off and seen in metrics.
    """

    def __init__(self, settings: S3Settings, make_client: Callable[[S3Settings], Any] | None = None) -> None:
        self._client = S3Client(settings, make_client or make_reading_client)
        self._threads = DaemonThreads("nanovllm-fetch")

    async def read(self, ref: ImageRef, held: FetchedImage | None, limit: SizeLimit) -> FetchedImage:
        """As `ObjectReader.read`."""
        body = _Body()
        try:
            return await self._threads.run(
                lambda: self._client.call(lambda client: _read_confirmed(client, ref, held, limit, body))
            )
        finally:
            body.abandon()

    async def head(self, ref: ImageRef) -> ObjectHead:
        """As `ObjectReader.head`."""
        bucket, key = ref.bucket_and_key
        which = {"VersionId": ref.version_id} if ref.version_id else {}

        def ask(client: Any) -> ObjectHead:
            answer = client.head_object(Bucket=bucket, Key=key, **which)
            return ObjectHead(
                answer.get("ContentType"),
                answer["ContentLength"],
                answer.get("LastModified"),
                lasting_version(answer.get("VersionId")),
                (answer.get("ETag") or "").strip('"') or None,
            )

        return await self._threads.run(lambda: self._client.call(ask))

    def prepare(self) -> None:
        """Make the client, with what the SDK knows of credentials; a failure is told by the first use."""
        self._client.prepare()

    def close(self) -> None:
        """Close idle connections; threads that still read end with their read timeout, or with the process."""
        self._client.close()


def _read_confirmed(
    client: Any, ref: ImageRef, held: FetchedImage | None, limit: SizeLimit, body: _Body
) -> FetchedImage:
    """As ``_read``; an answer for one object is the store's fault only where a probe gets such a one too."""
    try:
        return _read(client, ref, held, limit, body)
    except (ClientError, StoreUnreachable) as error:
        said = error if isinstance(error, NanoVLLMError) else classify(error)
        if not needs_probe(said):
            raise
        verdict = confirmed(said, _probe(client, ref.bucket_and_key[0]))
        if verdict is said:
            raise
        raise verdict from error


def _read(client: Any, ref: ImageRef, held: FetchedImage | None, limit: SizeLimit, body: _Body) -> FetchedImage:
    bucket, key = ref.bucket_and_key
    which = {"VersionId": ref.version_id} if ref.version_id else {}
    if ref.etag is not None:
        which["IfMatch"] = f'"{ref.etag}"'
    elif held is not None and held.etag:
        which["IfNoneMatch"] = held.etag
    try:
        answer = client.get_object(Bucket=bucket, Key=key, **which)
    except ClientError as error:
        if held is None or status_of(error) != 304:
            raise
        # Equal bytes may have been written again: as which version, only the store knows.
        version_id = _version_in(error)
        return held if version_id == held.version_id else replace(held, version_id=version_id)
    try:
        if answer.get("ETag") is None:
            raise no_entity_tag()
        body.begin(answer["Body"])
        data = _read_body(answer, limit)
    finally:
        body.end()
        answer["Body"].close()
    tag = answer["ETag"]
    if ref.etag is not None and tag.strip('"') != ref.etag:
        # Not every store, or proxy before one, knows the condition.
        raise ObjectChanged("the object has another entity tag than the job names")
    version_id = lasting_version(answer.get("VersionId") or ref.version_id)
    digest = hashlib.sha256(data).hexdigest()
    return FetchedImage(data, digest, ref.uri, version_id, tag, answer.get("Metadata") or {})


def _read_body(answer: Any, limit: SizeLimit) -> bytes:
    if "ContentLength" in answer:
        limit.check(answer["ContentLength"])
        return bytes(answer["Body"].read())
    data = bytearray()
    for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
        data += chunk
        limit.check(len(data))
    return bytes(data)


def _probe(client: Any, bucket: str) -> NanoVLLMError | None:
    """What the store says of an object whose key no job has chosen; None where it is there."""
    try:
        answer = client.get_object(Bucket=bucket, Key=PROBE_KEY)
    except Exception as error:
        return error if isinstance(error, NanoVLLMError) else classify(error)
    answer["Body"].close()
    return None if answer.get("ETag") else no_entity_tag()


def _version_in(error: ClientError) -> str | None:
    return lasting_version(error.response["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-version-id"))


class _Body:
    """The body that a thread reads, which the event loop can break off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stream: Any = None
        self._is_abandoned = False

    def begin(self, body: Any) -> None:
        """Reading begins. Raises FetchFailed where nothing waits for it any more."""
        with self._lock:
            if self._is_abandoned:
                raise FetchFailed("the job has ended")
            self._stream = getattr(body, "_raw_stream", None)

    def end(self) -> None:
        """Reading has ended, and the connection may serve another request."""
        with self._lock:
            self._stream = None

    def abandon(self) -> None:
        """Break off what is being read: a body that comes byte by byte would hold its thread without end."""
        with self._lock:
            self._is_abandoned = True
            if self._stream is not None:
                with contextlib.suppress(OSError, ValueError, RuntimeError):
                    self._stream.shutdown()  # urllib3 2.3; unlike close it wakes a thread that waits for data
