"""The page store: finished pages of documents as objects in S3, under everything that decides their answer.

What is finished once is not computed again: not after a retry, not by another worker, and not for another document of
the tenant that has an equal page.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

from botocore.exceptions import ClientError

from nanovllm.errors import ConfigurationError, FetchFailed, InvalidInput, PermanentError, StoreUnreachable
from nanovllm.messages.s3_uri import split_prefix_uri
from nanovllm.objects.conditional_put import put_if_absent, put_if_unchanged
from nanovllm.objects.errors import status_of

FORMAT_VERSION = 3
"""Of parts and of their keys; incremented when either changes, so that older parts are not found."""
DEFAULT_MAX_PART_BYTES = 4 * 1024 * 1024
DEFAULT_MAX_REQUESTS = 16
CONTENT_TYPE = "application/vnd.nanovllm.page"
MAX_REPLACEMENTS = 8
_MAGIC = b"nanovllm-page"
_HEADER = re.compile(rb"nanovllm-page (\d{1,9}) ([0-9a-f]{64}) ([0-9a-f]{64})\n")
_HEADER_BYTES = 256
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class PageKey:
    """Everything that decides the answer of one page.

    Attributes:
        page_digest: of the rendered page's pixels.
        model: revision of the model, and the engine's options that decide outputs (dtype, quantization, transform).
        prompt: as the model gets it, with the words of the text layer where it has them.
        sampling: all parameters, defaults included.
        response_schema: the constraint, as JSON; None: none.
        text_policy: what a text layer is used for.
        ladder_step: resolution, rotation and temperature of the attempt.
        tenant: whose page it is; tenants share none.
    """

    page_digest: str
    model: Mapping[str, Any]
    prompt: str
    sampling: Mapping[str, Any]
    response_schema: Any
    text_policy: str
    ladder_step: Mapping[str, Any]
    tenant: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all of it. The order of a schema's properties counts: it is that of the answer."""
        fields = asdict(self)
        schema = json.dumps(fields.pop("response_schema"))
        text = json.dumps([FORMAT_VERSION, fields, schema], sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass
class PageStoreCounts:
    """What became of the parts that were asked for and given.

    ``corrupt``: broken, cut, or of other content than it says; ``foreign``: no part, or that of another key;
    ``oversized``: beyond the limit, read or given. All three are passed over.
    """

    hits: int = 0
    misses: int = 0
    written: int = 0
    existing: int = 0
    corrupt: int = 0
    foreign: int = 0
    oversized: int = 0


class PageStore:
    """Keeps finished pages below ``target`` (``s3://bucket/prefix``); for many at once, of one event loop.

    ``call`` runs an operation with a boto3 S3 client in the calling thread (``S3Client.call``); ``attempt`` awaits one
    request, and may repeat it.

    Raises:
        ConfigurationError: ``target`` is not of that form.
    """

    def __init__(
        self,
        target: str,
        call: Callable[[Callable[[Any], Any]], Any],
        *,
        max_part_bytes: int = DEFAULT_MAX_PART_BYTES,
        max_requests: int = DEFAULT_MAX_REQUESTS,
        attempt: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]] = lambda request: request(),
    ) -> None:
        parts = split_prefix_uri(target)
        if parts is None:
            raise ConfigurationError(f"the page store {target} must have the form s3://bucket or s3://bucket/prefix")
        self._bucket, self._prefix = parts
        self._call = call
        self._max_part_bytes = max_part_bytes
        self._requests = asyncio.Semaphore(max_requests)
        self._attempt = attempt
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.counts = PageStoreCounts()

    def object_key(self, key: PageKey) -> str:
        """Where the part lies: below a folder of its tenant, which a policy or a lifecycle rule can name."""
        return "/".join(filter(None, (self._prefix, _folder(key.tenant), key.digest[:2], key.digest)))

    @asynccontextmanager
    async def turn(self, key: PageKey) -> AsyncIterator[None]:
        """Hold the page ``key`` inside: an equal page of this process waits, and finds what is kept meanwhile."""
        lock = self._turns.setdefault(key.digest, asyncio.Lock())
        async with lock:
            yield

    async def get(self, key: PageKey) -> bytes | None:
        """The finished page; None where there is none that can be used.

        Raises:
            StoreUnreachable: it refuses what it is asked. Without ``s3:ListBucket`` AWS answers 403 for what is not
                there.
            NanoVLLMError: as ``S3Client.call``.
        """
        part = await self._request(lambda client: self._read(client, key))
        payload = None if part is None else self._checked(key, part[0])
        if part is None:
            self.counts.misses += 1
        elif payload is not None:
            self.counts.hits += 1
        return payload

    async def put(self, key: PageKey, payload: bytes) -> bytes:
        """Keep a finished page and return the one that is kept: that of the first writer, for all to go on with.

        A page beyond the limit is not kept. What cannot be used is replaced.

        Raises:
            NanoVLLMError: as ``get``; TransientError where other writers won every time.
        """
        if len(payload) > self._max_part_bytes:
            self.counts.oversized += 1
            return payload
        request = {
            "Bucket": self._bucket,
            "Key": self.object_key(key),
            "Body": _part(key, payload),
            "ContentType": CONTENT_TYPE,
        }
        etag: str | None = None
        for _ in range(MAX_REPLACEMENTS):
            if await self._request(lambda client, etag=etag: _put(client, etag, request)):  # type: ignore[misc]
                self.counts.written += 1
                return payload
            part = await self._request(lambda client: self._read(client, key))
            etag = None if part is None else part[1]
            if part is not None and (kept := self._checked(key, part[0])) is not None:
                self.counts.existing += 1
                return kept
        raise FetchFailed(f"a part of the page store was changed by other writers {MAX_REPLACEMENTS} times meanwhile")

    async def _request(self, operation: Callable[[Any], Any]) -> Any:
        async with self._requests:
            return await self._attempt(lambda: self._ask(operation))

    async def _ask(self, operation: Callable[[Any], Any]) -> Any:
        try:
            return await asyncio.to_thread(self._call, operation)
        except (PermanentError, InvalidInput) as error:
            # Its bucket, the rights there: no fault of the page.
            raise StoreUnreachable(f"the page store s3://{self._bucket} refuses what it is asked: {error}") from error

    def _read(self, client: Any, key: PageKey) -> tuple[bytes | None, str] | None:
        """The bytes and the entity tag of a part; None: there is none; bytes None: they are too many."""
        try:
            answer = client.get_object(Bucket=self._bucket, Key=self.object_key(key))
        except ClientError as error:
            if status_of(error) == 404 and error.response["Error"].get("Code") == "NoSuchKey":
                return None
            raise
        limit = self._max_part_bytes + _HEADER_BYTES
        with closing(answer["Body"]) as body:
            if answer["ContentLength"] > limit:
                return None, answer["ETag"]
            return body.read(), answer["ETag"]

    def _checked(self, key: PageKey, part: bytes | None) -> bytes | None:
        """The page in ``part``; None, and counted, where it cannot be used."""
        if part is None:
            self.counts.oversized += 1
            return None
        header = _HEADER.match(part)
        if header is None:
            is_ours = part.startswith(_MAGIC) or _MAGIC.startswith(part)
            self.counts.corrupt += is_ours
            self.counts.foreign += not is_ours
            return None
        if (int(header[1]), header[2].decode()) != (FORMAT_VERSION, key.digest):
            self.counts.foreign += 1
            return None
        payload = part[header.end() :]
        if hashlib.sha256(payload).hexdigest() != header[3].decode():
            self.counts.corrupt += 1
            return None
        return payload


def _put(client: Any, etag: str | None, request: Mapping[str, Any]) -> bool:
    return put_if_absent(client, **request) if etag is None else put_if_unchanged(client, etag, **request)


def _part(key: PageKey, payload: bytes) -> bytes:
    header = f"{_MAGIC.decode()} {FORMAT_VERSION} {key.digest} {hashlib.sha256(payload).hexdigest()}\n"
    return header.encode() + payload


def _folder(tenant: str) -> str:
    """A segment of a key for each tenant, and for no other: the name where it is plain, or its digest; ``~``: none."""
    if not tenant:
        return "~"
    if _PLAIN_NAME.fullmatch(tenant):
        return tenant
    return "~" + hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()
