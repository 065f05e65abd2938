"""The object fetcher: images and documents to bytes, with an allow-list, size limits and conditional requests."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Self

from botocore.exceptions import ClientError

from nanovllm.errors import (
    DocumentTooLarge,
    FetchFailed,
    ForbiddenKey,
    ForbiddenUri,
    ImageTooLarge,
    InvalidInput,
    NanoVLLMError,
    ObjectChanged,
    ObjectRefused,
    ObjectUnavailable,
    StoreUnreachable,
    SystemicError,
    TransientError,
)
from nanovllm.messages.job import ImageRef
from nanovllm.messages.s3_uri import split_prefix_uri
from nanovllm.objects.daemon_threads import DaemonThreads
from nanovllm.objects.errors import classify, status_of
from nanovllm.objects.s3_client import S3Client
from nanovllm.objects.versions import lasting_version
from nanovllm.settings.s3 import S3Settings

CHUNK_BYTES = 256 * 1024
PROBE_KEY = "nanovllm-probe"
"""What is asked for to learn whether a strange answer concerns one object or the store; it need not exist."""


@dataclass(frozen=True)
class FetchedImage:
    """The bytes of one image or document, and exactly what they are; ``etag`` as the store gave it.

    ``metadata`` is the user metadata of its object.
    """

    data: bytes
    sha256: str
    uri: str | None = None
    version_id: str | None = None
    etag: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectHead:
    """What the store says of an object without giving it; ``size`` in bytes, ``etag`` without quotes."""

    content_type: str | None
    size: int
    last_modified: datetime | None
    version_id: str | None
    etag: str | None


class AllowList:
    """Buckets and prefixes that jobs may read, from ``s3://bucket`` and ``s3://bucket/prefix`` entries; none: nothing.

    A prefix ends at a path boundary: ``s3://bucket/in`` allows ``in`` and ``in/…``, never ``internal/…``;
    ``s3://bucket/in/*`` is the same.
    """

    def __init__(self, uris: Sequence[str] = ()) -> None:
        # S3Settings refuses entries of another form.
        self._entries = list(filter(None, map(split_prefix_uri, uris)))

    def __bool__(self) -> bool:
        return bool(self._entries)

    def check(self, bucket: str, key: str) -> None:
        """Return when a job may read the object.

        Raises:
            ForbiddenUri: it may not.
        """
        # HTTP clients resolve dot segments: s3://bucket/in/../secret would be asked for as s3://bucket/secret.
        if any(segment in (".", "..") for segment in key.split("/")):
            raise ForbiddenKey("the key of an image has a '.' or '..' segment")
        for allowed_bucket, prefix in self._entries:
            if bucket == allowed_bucket and (not prefix or key == prefix or key.startswith(prefix + "/")):
                return
        raise ForbiddenUri(f"s3.allow of this worker does not list s3://{bucket}, or not with this prefix of the key")


class ObjectFetcher:
    """Reads images from S3 in threads of its own: the SDK blocks, and the event loop must not.

    One attempt a call: the SDK's own retries are off, because the worker's are counted, backed off and seen in metrics.
    """

    def __init__(
        self, settings: S3Settings, *, max_bytes: int, client_factory: Callable[[S3Settings], Any] | None = None
    ) -> None:
        self._allow = AllowList(settings.allow)
        self._max_bytes = max_bytes
        self._client = S3Client(settings, client_factory)
        self._connections = asyncio.Semaphore(settings.max_connections)
        self._threads = DaemonThreads("nanovllm-fetch")
        self._timeout_s = settings.object_timeout_s
        self._too_large: type[InvalidInput] = ImageTooLarge

    def for_documents(self, max_bytes: int, buckets: Sequence[str]) -> Self:
        """A fetcher of documents with the client and the connections of this one.

        It reads what ``s3.allow`` names, or where that is unset the ``buckets`` of the routes.
        """
        documents = copy(self)
        documents._max_bytes = max_bytes
        documents._too_large = DocumentTooLarge
        if not self._allow:
            documents._allow = AllowList([f"s3://{bucket}" for bucket in buckets])
        return documents

    def check(self, ref: ImageRef) -> None:
        """Refuse before anything is read what a job may not read.

        Raises:
            ForbiddenUri: its bucket, prefix or key is not allowed.
            ImageTooLarge: its bytes, given in the job itself, are too many.
        """
        if ref.data is not None:
            self._check_size(len(ref.data), "an image in the job")
        else:
            self._allow.check(*ref.bucket_and_key)

    async def fetch(self, ref: ImageRef, *, held: FetchedImage | None = None) -> FetchedImage:
        """The bytes of one image; those of ``held``, read from the same object before, where they are still its bytes.

        Raises:
            ForbiddenUri, ImageTooLarge, InvalidInput, ObjectNotFound, ObjectForbidden, ObjectArchived, ObjectChanged:
                for good.
            FetchFailed, ObjectUnavailable, ObjectRefused: worth another attempt.
            CredentialsRefused, StoreUnreachable: nothing can be read until the configuration or the store is repaired.
        """
        self.check(ref)
        if ref.data is not None:
            return self.checked(ref, FetchedImage(ref.data, hashlib.sha256(ref.data).hexdigest()))
        async with self._connections:
            body = _Body()
            try:
                async with asyncio.timeout(self._timeout_s) as limit:
                    return await self._threads.run(lambda: self._read(ref, held, body))
            except TimeoutError:
                if not limit.expired():
                    raise
                raise FetchFailed(f"the object was not read within {self._timeout_s:g} s") from None
            finally:
                body.abandon()

    async def head(self, ref: ImageRef) -> ObjectHead:
        """What the store says of an object now, whatever entity tag ``ref`` names. Raises as ``fetch``."""
        self.check(ref)
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

        async with self._connections:
            try:
                async with asyncio.timeout(self._timeout_s) as limit:
                    return await self._threads.run(lambda: self._client.call(ask))
            except TimeoutError:
                if not limit.expired():
                    raise
                raise FetchFailed(f"the store said nothing of the object within {self._timeout_s:g} s") from None

    def checked(self, ref: ImageRef, image: FetchedImage) -> FetchedImage:
        """``image``, if it is what the job has promised.

        Raises:
            ObjectChanged: it has another digest.
        """
        if ref.sha256 is not None and ref.sha256 != image.sha256:
            raise ObjectChanged(f"the image has sha256 {image.sha256}, the job promised {ref.sha256}")
        return image

    def begin_connecting(self) -> None:
        """Have a thread make the client, with what the SDK knows of credentials; a failure is told by the first use."""
        threading.Thread(target=self._client.prepare, name="nanovllm-s3", daemon=True).start()

    def close(self) -> None:
        """Close idle connections; threads that still read end with their read timeout, or with the process."""
        self._client.close()

    def _read(self, ref: ImageRef, held: FetchedImage | None, body: _Body) -> FetchedImage:
        return self.checked(ref, self._client.call(lambda client: self._read_confirmed(client, ref, held, body)))

    def _read_confirmed(self, client: Any, ref: ImageRef, held: FetchedImage | None, body: _Body) -> FetchedImage:
        """As ``_read_with``; an answer for one object is the store's fault only where a probe gets such a one too."""
        try:
            return self._read_with(client, ref, held, body)
        except (ClientError, StoreUnreachable) as error:
            said = error if isinstance(error, NanoVLLMError) else classify(error)
            if not isinstance(said, (SystemicError, ObjectRefused)):
                raise
            probed = _probe(client, ref.bucket_and_key[0])
            if isinstance(probed, SystemicError) and isinstance(said, SystemicError):
                raise
            if isinstance(probed, (SystemicError, TransientError)) and not isinstance(probed, ObjectUnavailable):
                raise FetchFailed(str(said)) from error  # the circuit breaker counts it
            raise ObjectRefused(f"{said}; this object alone: others are answered") from error

    def _read_with(self, client: Any, ref: ImageRef, held: FetchedImage | None, body: _Body) -> FetchedImage:
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
                raise _no_entity_tag()
            body.begin(answer["Body"])
            data = self._read_body(answer)
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

    def _read_body(self, answer: Any) -> bytes:
        self._check_size(answer.get("ContentLength", 0), "the object")
        data = bytearray()
        for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
            data += chunk
            self._check_size(len(data), "the object")
        return bytes(data)

    def _check_size(self, nbytes: int, what: str) -> None:
        if nbytes > self._max_bytes:
            raise self._too_large(f"{what} has {nbytes} bytes or more, above the limit of {self._max_bytes}")


def _probe(client: Any, bucket: str) -> NanoVLLMError | None:
    """What the store says of an object whose key no job has chosen; None where it is there."""
    try:
        answer = client.get_object(Bucket=bucket, Key=PROBE_KEY)
    except Exception as error:
        return error if isinstance(error, NanoVLLMError) else classify(error)
    answer["Body"].close()
    return None if answer.get("ETag") else _no_entity_tag()


def _no_entity_tag() -> StoreUnreachable:
    # A console, a proxy or a captive portal answers 200 to anything; every S3 server sends an entity tag.
    return StoreUnreachable("what answers at the endpoint of the object store is no S3 server: no ETag")


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


def _version_in(error: ClientError) -> str | None:
    return lasting_version(error.response["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-version-id"))
