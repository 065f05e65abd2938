"""Caches between jobs: single flight, and images read and prepared.

An object of a version or entity tag that the job names never changes. Any other is asked for each time, with the entity
tag of what is at hand: the store answers 304 without a body where nothing has changed (RFC 9110, 13.1.2), so that no
job ever gets a picture that was replaced before the job came. A HEAD before each GET would prove the same with one
request more.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

from nanovllm.errors import NanoVLLMError
from nanovllm.messages.job import ImageRef
from nanovllm.messages.s3_uri import split_object_uri
from nanovllm.metrics import Metrics
from nanovllm.objects.reader import FetchedImage
from nanovllm.vision.images.pool import DecoderPool
from nanovllm.vision.images.preprocess import PreparedImage

Reuse = Literal["hit", "joined", "miss"]

T = TypeVar("T")

ENTRY_BYTES = 512
"""What an entry of a cache takes beside its key and its value."""


@dataclass
class _Flight:
    task: asyncio.Task[Any]
    waiting: int = 0


class SingleFlightCache:
    """A single-flight LRU cache of at most ``max_bytes``: equal work under way is joined.

    For one event loop. ``max_bytes`` 0 keeps nothing and still joins. What is larger than the bound is made and not
    kept. A failure goes to all who wait for it and is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._flights: dict[Hashable, _Flight] = {}
        self.bytes = 0

    def peek(self, key: Hashable) -> Any | None:
        """What is kept under ``key``, which counts as a use, or None."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def knows(self, key: Hashable) -> bool:
        """Whether the value of ``key`` is kept or under way."""
        return key in self._kept or key in self._flights

    async def get(self, key: Hashable, make: Callable[[], Awaitable[tuple[T, int]]]) -> tuple[T, Reuse]:
        """The value of ``key``; ``make`` returns it and its bytes, where it is neither kept nor under way.

        Who cancels the call gives up the answer only, as long as others are waiting for it.
        """
        kept = self.peek(key)
        if kept is not None:
            return kept, "hit"
        reuse: Reuse = "joined" if key in self._flights else "miss"
        if reuse == "miss":
            self._flights[key] = _Flight(asyncio.create_task(self._make(key, make)))
        flight = self._flights[key]
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task), reuse
        finally:
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                # Removed at once: a later call must not wait for what is being cancelled.
                del self._flights[key]
                flight.task.cancel()

    def keep(self, key: Hashable, value: Any, size: int) -> None:
        """Keep ``value`` of ``size`` bytes in place of whatever was kept under ``key``, whose bytes count too."""
        size += ENTRY_BYTES + _bytes_of(key)
        if key in self._kept:
            self.bytes -= self._kept.pop(key)[1]
        if size > self._max_bytes:
            return
        self._kept[key] = (value, size)
        self.bytes += size
        while self.bytes > self._max_bytes:
            _, (_, freed) = self._kept.popitem(last=False)
            self.bytes -= freed

    async def _make(self, key: Hashable, make: Callable[[], Awaitable[tuple[T, int]]]) -> T:
        try:
            value, size = await make()
            self.keep(key, value, size)
            return value
        finally:
            flight = self._flights.get(key)
            if flight is not None and flight.task is asyncio.current_task():
                del self._flights[key]


class Fetcher(Protocol):
    """What reads images."""

    def check(self, ref: ImageRef) -> None:
        """As `ObjectFetcher.check`."""

    def checked(self, ref: ImageRef, image: FetchedImage) -> FetchedImage:
        """As `ObjectFetcher.checked`."""

    async def fetch(self, ref: ImageRef, *, held: FetchedImage | None = None, tenant: str = "") -> FetchedImage:
        """As `ObjectFetcher.fetch`, for a job of ``tenant``."""


def _bytes_of(key: Hashable) -> int:
    return sum(len(part) for part in key if isinstance(part, (str, bytes))) if isinstance(key, tuple) else 0


class ImageCache:
    """Reads and prepares images through ``fetcher`` and ``decoders``, each distinct one once as long as it is kept.

    ``salt`` keeps tenants apart: an entry answers its own tenant alone, and no time tells others of it. ``find_image``
    tells of a file's sha256 and a salt what the engine has embedded already.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        decoders: DecoderPool | None,
        find_image: Callable[[bytes, bytes], PreparedImage | None],
        metrics: Metrics,
        *,
        max_bytes: int,
    ) -> None:
        self._find_image = find_image
        self._fetcher = fetcher
        self._decoders = decoders
        self._metrics = metrics
        self._cache = SingleFlightCache(max_bytes)

    async def fetch(self, ref: ImageRef, salt: bytes, tenant: str = "", *, may_reuse: bool = True) -> FetchedImage:
        """The bytes of an image, as ``ObjectFetcher.fetch`` and with its errors."""
        self._fetcher.check(ref)
        if ref.data is not None or not may_reuse:
            return self._downloaded(await self._fetcher.fetch(ref, tenant=tenant))
        key = ("object", salt, ref.uri, ref.version_id, ref.etag)
        # Others may wait for the bytes who have promised nothing about them, or something else.
        anyone = ref.model_copy(update={"sha256": None})

        async def read() -> tuple[FetchedImage, int]:
            image = self._downloaded(await self._fetcher.fetch(anyone, tenant=tenant))
            return image, len(image.data)

        is_named = ref.version_id is not None or ref.etag is not None
        may_have_changed = not is_named and self._cache.knows(key)
        try:
            image, reuse = await self._cache.get(key, read)
        except NanoVLLMError:
            if not may_have_changed:
                raise
            # It was asked for before this job came, and may have been written since.
            image, reuse = (await read())[0], "miss"
        if reuse != "miss" and may_have_changed:
            # It was read, or its reading began, before this job came; it may have been replaced since.
            current = await self._fetcher.fetch(anyone, held=image, tenant=tenant)
            if current.data is not image.data:
                current, reuse = self._downloaded(current), "miss"
            if current is not image:
                self._cache.keep(key, current, len(current.data))
                image = current
        self._metrics.reuse.labels("fetch", reuse).inc()
        return self._fetcher.checked(ref, image)

    async def prepare(
        self, image: FetchedImage, salt: bytes, tenant: str = "", *, may_reuse: bool = True
    ) -> PreparedImage:
        """Decode and transform an image in the tenant's turn, as ``DecoderPool.prepare`` and with its errors."""
        decoders = self._decoders
        assert decoders is not None  # jobs with images were refused without

        digest = bytes.fromhex(image.sha256)

        async def decode() -> tuple[PreparedImage, int]:
            # The digest is ours: a decoder process is trusted with nothing that another file could be found by.
            prepared = replace(await decoders.prepare(image.data, tenant), file_digest=digest)
            return prepared, prepared.nbytes

        if not may_reuse:
            return _stored((await decode())[0], image)
        found = self._find_image(digest, salt)
        if found is not None:
            self._metrics.reuse.labels("prepare", "hit").inc()
            return found
        prepared, reuse = await self._cache.get(("pixels", salt, digest), decode)
        self._metrics.reuse.labels("prepare", reuse).inc()
        return _stored(prepared, image)

    def _downloaded(self, image: FetchedImage) -> FetchedImage:
        if image.uri is not None:
            self._metrics.fetched_objects.inc()
            self._metrics.fetched_bytes.inc(len(image.data))
        return image


def _stored(prepared: PreparedImage, image: FetchedImage) -> PreparedImage:
    """``prepared`` with the place of its file in S3, which an equal file of another job may not have."""
    if prepared.file is None or not prepared.file.is_original or image.uri is None or image.version_id is None:
        return prepared
    if split_object_uri(image.uri) is None:
        return prepared
    return replace(prepared, stored_at=(image.uri, image.version_id))
