"""The reader of objects by obstore: the clients are Rust's, and a request costs a fraction of boto3's CPU."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import obstore

from nanovllm.errors import InvalidInput, NanoVLLMError, ObjectChanged, SystemicError
from nanovllm.messages.job import ImageRef
from nanovllm.messages.s3_uri import ObjectAddress
from nanovllm.objects.daemon_threads import DaemonThreads
from nanovllm.objects.errors import no_entity_tag
from nanovllm.objects.obstore_errors import answer_of, classify_obstore, is_unread
from nanovllm.objects.reader import (
    PROBE_KEY,
    FetchedImage,
    ObjectHead,
    ObjectReader,
    SizeLimit,
    confirmed,
    needs_probe,
)
from nanovllm.objects.versions import lasting_version

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult
    from obstore.store import ObjectStore

T = TypeVar("T")

_INEXPRESSIBLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
MAX_INLINE_DIGEST_BYTES = 256 * 1024
"""Larger objects are digested in a thread: the event loop would be held up."""


class Stores(Protocol):
    """Opens obstore's stores of one scheme; of one thread at a time."""

    def open(self, bucket: str) -> ObjectStore:
        """The store of a bucket; may block. Raises NanoVLLMError where none can be made."""

    def failure(self) -> NanoVLLMError | None:
        """Why the store's credentials could not be had the last time; None: they could."""

    def can_read(self, bucket: str) -> bool:
        """Whether obstore speaks what the bucket needs."""

    def forget(self) -> None:
        """Find out credentials, endpoint and region anew."""


class ObstoreReader:
    """Reads objects with obstore on the event loop.

    ``fallback`` reads what obstore cannot: a key with an empty segment or a control character, a bucket that answers
    with a redirect, a header that is no ASCII. Without one such an object is refused.
    """

    def __init__(self, stores: Stores, fallback: ObjectReader | None = None) -> None:
        self._stores = stores
        self._fallback = fallback
        self._open: dict[str, ObjectStore] = {}
        self._elsewhere: set[str] = set()
        self._opening = asyncio.Lock()
        self._threads = DaemonThreads("nanovllm-obstore")

    async def read(self, ref: ImageRef, held: FetchedImage | None, limit: SizeLimit) -> FetchedImage:
        """As `ObjectReader.read`. The version of ``held`` is not known any more where it is given back."""
        return await self._either(
            ref,
            lambda: self._confirmed(ref.address.bucket, lambda: self._read(ref, held, limit)),
            lambda other: other.read(ref, held, limit),
        )

    async def head(self, ref: ImageRef) -> ObjectHead:
        """As `ObjectReader.head`."""
        return await self._either(ref, lambda: self._head(ref), lambda other: other.head(ref))

    def prepare(self) -> None:
        """Make the client of the reader behind this one; stores are opened by the first use of their bucket."""
        if self._fallback is not None:
            self._fallback.prepare()

    def close(self) -> None:
        """Close idle connections."""
        self._open.clear()
        if self._fallback is not None:
            self._fallback.close()

    async def _either(
        self, ref: ImageRef, ask: Callable[[], Awaitable[T]], ask_other: Callable[[ObjectReader], Awaitable[T]]
    ) -> T:
        bucket = ref.address.bucket
        if not is_expressible(ref.address.key):
            if self._fallback is None:
                raise InvalidInput("obstore reads no key with an empty segment ('//') or a control character")
        elif self._stores.can_read(bucket) and bucket not in self._elsewhere:
            try:
                return await ask()
            except _UnreadError as unread:
                if self._fallback is None:
                    raise unread.said from unread.__cause__
                if unread.is_redirect:
                    self._elsewhere.add(bucket)
        assert self._fallback is not None
        return await ask_other(self._fallback)

    async def _confirmed(self, bucket: str, ask: Callable[[], Awaitable[T]]) -> T:
        """As ``ask``; an answer for one object is the store's fault only where a probe gets such a one too."""
        try:
            return await ask()
        except NanoVLLMError as said:
            if not needs_probe(said):
                raise
            verdict = confirmed(said, await self._probe(bucket))
            if isinstance(verdict, SystemicError):
                self._forget()
            if verdict is said:
                raise
            raise verdict from said

    async def _read(self, ref: ImageRef, held: FetchedImage | None, limit: SizeLimit) -> FetchedImage:
        options: GetOptions = {}
        if ref.version_id:
            options["version"] = ref.version_id
        if ref.etag is not None:
            options["if_match"] = f'"{ref.etag}"'
        elif held is not None and held.etag:
            options["if_none_match"] = held.etag
        answer = await self._get(ref.address, options)
        if answer is None:
            assert held is not None
            # Equal bytes may have been written again, and obstore does not say as which version.
            return replace(held, version_id=None) if held.version_id else held
        meta = answer.meta
        tag = meta["e_tag"]
        if tag is None:
            raise no_entity_tag()
        limit.check(meta["size"])
        metadata = {name: value for name, value in answer.attributes.items() if not name[:1].isupper()}
        try:
            data = bytes(await answer.bytes_async())
        except Exception as error:
            raise classify_obstore(error) from error
        limit.check(len(data))
        if ref.etag is not None and tag.strip('"') != ref.etag:
            # Not every store, or proxy before one, knows the condition.
            raise ObjectChanged("the object has another entity tag than the job names")
        version_id = lasting_version(meta.get("version") or ref.version_id)
        return FetchedImage(data, await self._digest(data), ref.uri, version_id, tag, metadata)

    async def _head(self, ref: ImageRef) -> ObjectHead:
        options: GetOptions = {"head": True}
        if ref.version_id:
            options["version"] = ref.version_id
        try:
            answer = await self._get(ref.address, options)
        except SystemicError:
            self._forget()
            raise
        assert answer is not None  # it has no condition
        meta, attributes = answer.meta, answer.attributes
        return ObjectHead(
            attributes.get("Content-Type"),
            meta["size"],
            meta["last_modified"],
            lasting_version(meta.get("version")),
            (meta["e_tag"] or "").strip('"') or None,
        )

    async def _probe(self, bucket: str) -> NanoVLLMError | None:
        """What the store says of an object whose key no job has chosen; None where it is there."""
        try:
            answer = await self._get(ObjectAddress("", bucket, PROBE_KEY), {})
        except _UnreadError as unread:
            return unread.said
        except NanoVLLMError as error:
            return error
        return None if answer is not None and answer.meta["e_tag"] else no_entity_tag()

    async def _get(self, address: ObjectAddress, options: GetOptions) -> GetResult | None:
        """The answer before its body; None: 304, it is not modified."""
        store = self._open.get(address.bucket) or await self._opened(address.bucket)
        try:
            return await obstore.get_async(store, address.key, options=options)
        except Exception as error:
            if answer_of(error)[0] == 304:
                return None
            said = self._stores.failure() or classify_obstore(error)
            if is_unread(error) and self._stores.failure() is None:
                raise _UnreadError(said, 300 <= answer_of(error)[0] < 400) from error
            raise said from error

    async def _opened(self, bucket: str) -> ObjectStore:
        async with self._opening:
            if bucket not in self._open:
                self._open[bucket] = await self._threads.run(lambda: self._stores.open(bucket))
            return self._open[bucket]

    def _forget(self) -> None:
        self._open.clear()
        self._elsewhere.clear()
        self._stores.forget()

    async def _digest(self, data: bytes) -> str:
        if len(data) <= MAX_INLINE_DIGEST_BYTES:
            return hashlib.sha256(data).hexdigest()
        return await self._threads.run(lambda: hashlib.sha256(data).hexdigest())


class _UnreadError(Exception):
    """The store answered what obstore does not read; ``said`` is what that means where no other client does."""

    def __init__(self, said: NanoVLLMError, is_redirect: bool) -> None:
        super().__init__(said)
        self.said = said
        self.is_redirect = is_redirect


def is_expressible(key: str) -> bool:
    """Whether a path of obstore can be ``key``: paths have no empty segments and no control characters."""
    return "" not in key.split("/") and not _INEXPRESSIBLE.search(key)
