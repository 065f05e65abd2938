"""Images of a job to bytes: what is allowed, how much of it, and what each failure means."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProxyConnectionError,
    SSLError,
)

from nanovllm.errors import (
    CredentialsRefused,
    FetchFailed,
    ForbiddenUri,
    ImageTooLarge,
    InvalidInput,
    NanoVLLMError,
    ObjectChanged,
    ObjectForbidden,
    ObjectNotFound,
    PermanentError,
    StoreUnreachable,
)
from nanovllm.pipeline.job import ImageRef
from nanovllm.pipeline.settings import S3Settings

CHUNK_BYTES = 256 * 1024

_URI = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9.\-_]{1,62})(?:/(.*))?", re.DOTALL)

_NOT_FOUND = frozenset({"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "404", "NotFound", "MethodNotAllowed"})
_CREDENTIALS = frozenset(
    {
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "InvalidToken",
        "TokenRefreshRequired",
        "RequestTimeTooSkewed",
        "UnrecognizedClientException",
        "AuthorizationHeaderMalformed",
    }
)
_BUSY = frozenset({"SlowDown", "ThrottlingException", "RequestTimeout", "OperationAborted", "TooManyRequests"})


@dataclass(frozen=True)
class FetchedImage:
    """The encoded bytes of one image, and exactly what they are; ``etag`` as the store gave it."""

    data: bytes
    sha256: str
    uri: str | None = None
    version_id: str | None = None
    etag: str | None = None


@dataclass(frozen=True)
class AllowList:
    """Buckets and prefixes that jobs may read; empty: none.

    A prefix ends at a path boundary: ``s3://bucket/in`` allows ``in`` and ``in/…``, never ``internal/…``.
    """

    entries: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, uris: Sequence[str]) -> AllowList:
        """From ``s3://bucket`` and ``s3://bucket/prefix`` entries.

        Raises:
            ForbiddenUri: an entry of another form.
        """
        entries = []
        for uri in uris:
            match = _URI.fullmatch(uri)
            if match is None:
                raise ForbiddenUri("an entry of the allow-list is not s3://bucket or s3://bucket/prefix")
            entries.append((match[1], (match[2] or "").rstrip("/")))
        return cls(tuple(entries))

    def check(self, bucket: str, key: str) -> None:
        """Return when a job may read the object.

        Raises:
            ForbiddenUri: it may not.
        """
        # HTTP clients resolve dot segments: s3://bucket/in/../secret would be asked for as s3://bucket/secret.
        if any(segment in (".", "..") for segment in key.split("/")):
            raise ForbiddenUri("the key of an image has a '.' or '..' segment")
        for allowed_bucket, prefix in self.entries:
            if bucket == allowed_bucket and (not prefix or key == prefix or key.startswith(prefix + "/")):
                return
        raise ForbiddenUri(f"s3://{bucket}/… is not on the allow-list of this worker, or not this prefix of it")


class ObjectFetcher:
    """Reads images from S3 in threads of its own: the SDK blocks, and the event loop must not.

    One attempt a call: the SDK's own retries are off, because the worker's are counted, backed off and seen in metrics.
    """

    def __init__(
        self, settings: S3Settings, *, max_bytes: int, client_factory: Callable[[S3Settings], Any] | None = None
    ) -> None:
        self._settings = settings
        self._allow = AllowList.parse(settings.allow)
        self._max_bytes = max_bytes
        self._make_client = client_factory or make_client
        self._client: Any = None
        self._lock = threading.Lock()
        self._places = asyncio.Semaphore(settings.max_connections)

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
            ForbiddenUri, ImageTooLarge, ObjectNotFound, ObjectForbidden, ObjectChanged: for good.
            FetchFailed: worth another attempt.
            CredentialsRefused, StoreUnreachable: nothing can be read until somebody acts.
        """
        self.check(ref)
        if ref.data is not None:
            return self.checked(ref, FetchedImage(ref.data, hashlib.sha256(ref.data).hexdigest()))
        await self._places.acquire()
        return await _in_daemon_thread(lambda: self._read(ref, held), self._places.release)

    def checked(self, ref: ImageRef, image: FetchedImage) -> FetchedImage:
        """``image``, if it is what the job has promised.

        Raises:
            ObjectChanged: it has another digest.
        """
        if ref.sha256 is not None and ref.sha256 != image.sha256:
            raise ObjectChanged(f"the image has sha256 {image.sha256}, the job promised {ref.sha256}")
        return image

    def close(self) -> None:
        """Close idle connections; threads that still read end with their read timeout, or with the process."""
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _read(self, ref: ImageRef, held: FetchedImage | None) -> FetchedImage:
        try:
            bucket, key = ref.bucket_and_key
            which = {"VersionId": ref.version_id} if ref.version_id else {}
            if ref.etag is not None:
                which["IfMatch"] = f'"{ref.etag}"'
            elif held is not None and held.etag:
                which["IfNoneMatch"] = held.etag
            answer = self._connected().get_object(Bucket=bucket, Key=key, **which)
            try:
                data = self._read_body(answer)
            finally:
                answer["Body"].close()
        except NanoVLLMError:
            raise
        except Exception as error:
            if held is not None and isinstance(error, ClientError) and _is_unchanged(error):
                # Equal bytes may have been written again: as which version, only the store knows.
                version_id = _version_in(error)
                is_same = version_id == held.version_id
                return self.checked(ref, held if is_same else replace(held, version_id=version_id))
            classed = classify(error)
            if isinstance(classed, CredentialsRefused):
                # The next attempt reads credentials anew: a mounted secret may have been replaced.
                with self._lock:
                    self._client = None
            raise classed from error
        tag = answer.get("ETag")
        if ref.etag is not None and (tag or "").strip('"') != ref.etag:
            # Not every store, or proxy before one, knows the condition.
            raise ObjectChanged("the object has another entity tag than the job names")
        version_id = answer.get("VersionId") or ref.version_id
        fetched = FetchedImage(
            data,
            hashlib.sha256(data).hexdigest(),
            ref.uri,
            None if version_id == "null" else version_id,
            tag,
        )
        return self.checked(ref, fetched)

    def _read_body(self, answer: Any) -> bytes:
        self._check_size(answer.get("ContentLength", 0), "the object")
        data = bytearray()
        for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
            data += chunk
            self._check_size(len(data), "the object")
        return bytes(data)

    def _check_size(self, nbytes: int, what: str) -> None:
        if nbytes > self._max_bytes:
            raise ImageTooLarge(f"{what} has {nbytes} bytes or more, above the limit of {self._max_bytes}")

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = self._make_client(self._settings)
            return self._client


async def _in_daemon_thread(read: Callable[[], FetchedImage], ended: Callable[[], None]) -> FetchedImage:
    """What ``read`` returns or raises; ``ended`` is called in the event loop when the thread ends, also after a cancel.

    Not an executor: the interpreter waits for its threads, and a store that hangs would outlast the drain's budget.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[FetchedImage] = loop.create_future()

    def settle(image: FetchedImage | None, error: BaseException | None) -> None:
        ended()
        if outcome.cancelled():
            return
        if error is not None:
            outcome.set_exception(error)
        elif image is not None:
            outcome.set_result(image)

    def run() -> None:
        image, error = None, None
        try:
            image = read()
        except BaseException as failure:
            error = failure
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, image, error)

    threading.Thread(target=run, name="nanovllm-fetch", daemon=True).start()
    return await outcome


def make_client(settings: S3Settings) -> Any:
    """An S3 client with the worker's time-outs; credentials come from the SDK's own chain."""
    # A session of its own: boto3's default one keeps credentials that were refused.
    return boto3.session.Session().client(
        "s3",
        endpoint_url=settings.endpoint_url,
        region_name=settings.region,
        config=Config(
            connect_timeout=settings.connect_timeout_s,
            read_timeout=settings.read_timeout_s,
            max_pool_connections=settings.max_connections,
            retries={"total_max_attempts": 1},
            s3={"addressing_style": settings.addressing_style},
            # Only where the store sends checksums by itself: other S3 servers refuse or lack the newer header.
            response_checksum_validation="when_required",
            request_checksum_calculation="when_required",
        ),
    )


def _is_unchanged(error: ClientError) -> bool:
    return error.response["ResponseMetadata"].get("HTTPStatusCode") == 304


def _version_in(error: ClientError) -> str | None:
    version: str | None = error.response["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-version-id")
    return None if version == "null" else version


def classify(error: Exception) -> NanoVLLMError:
    """What a failure of the SDK means for the job. The message never repeats URLs or credentials."""
    if isinstance(error, ClientError):
        return _classify_answer(error)
    if isinstance(error, (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)):
        return CredentialsRefused(f"no usable credentials for the object store: {type(error).__name__}")
    if isinstance(error, ParamValidationError):
        return InvalidInput("the object store's SDK refuses the bucket, key or version of the image")
    if isinstance(error, (EndpointConnectionError, ConnectTimeoutError, ProxyConnectionError, SSLError)):
        # A job cannot cause this, so it must not pay for it: an outage would make a dead letter of every job.
        return StoreUnreachable(f"the object store cannot be reached: {type(error).__name__}")
    if isinstance(error, (BotoCoreError, OSError)):
        return FetchFailed(f"the object store broke off: {type(error).__name__}")
    # urllib3 and http.client raise their own errors while the body is read.
    return FetchFailed(f"reading the object broke off: {type(error).__name__}")


def _classify_answer(error: ClientError) -> NanoVLLMError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    said = f"the object store answered {status} {code}".rstrip()
    if code in _CREDENTIALS:
        return CredentialsRefused(said)
    if code in _NOT_FOUND or status == 404:
        return ObjectNotFound(said)
    if code in _BUSY or status >= 500 or status in (408, 409, 429):
        return FetchFailed(said)
    if status == 412:
        return ObjectChanged(f"{said}: the object has another entity tag than the job names")
    if status in (401, 403):
        return ObjectForbidden(said)
    if code in ("InvalidArgument", "InvalidBucketName", "KeyTooLongError"):
        return InvalidInput(said)
    return PermanentError(said)
