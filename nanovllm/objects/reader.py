"""The interface of a reader of objects, of which each scheme has one, and what readers give."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from nanovllm.errors import (
    FetchFailed,
    InvalidInput,
    NanoVLLMError,
    ObjectRefused,
    ObjectUnavailable,
    SystemicError,
    TransientError,
)
from nanovllm.messages.job import ImageRef

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


@dataclass(frozen=True)
class SizeLimit:
    """The most bytes of one image or document, and the error that more of them are."""

    max_bytes: int
    error: type[InvalidInput]

    def check(self, nbytes: int, what: str = "the object") -> None:
        """Raise ``error`` where ``what`` is too large."""
        if nbytes > self.max_bytes:
            raise self.error(f"{what} has {nbytes} bytes or more, above the limit of {self.max_bytes}")


class ObjectReader(Protocol):
    """Reads the objects of one scheme, one attempt a call; what a job may read, and for how long, is decided before.

    ``read`` and ``head`` raise as `ObjectFetcher.fetch`, and may be cancelled.
    """

    async def read(self, ref: ImageRef, held: FetchedImage | None, limit: SizeLimit) -> FetchedImage:
        """The bytes of an object; ``held``, read from it before, where the store says that they are still its bytes."""

    async def head(self, ref: ImageRef) -> ObjectHead:
        """What the store says of an object now, whatever entity tag ``ref`` names."""

    def prepare(self) -> None:
        """Make the client, as far as that can be done; it may block."""

    def close(self) -> None:
        """Close idle connections."""


@asynccontextmanager
async def connection_within(connections: asyncio.Semaphore, seconds: float, timed_out: str) -> AsyncIterator[None]:
    """One of ``connections``, for so many seconds once it is free. Raises FetchFailed, ``timed_out``, after them."""
    async with connections:
        try:
            async with asyncio.timeout(seconds) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise FetchFailed(timed_out) from None


def needs_probe(said: NanoVLLMError) -> bool:
    """Whether only an answer for another object tells if this one is at fault or the store."""
    return isinstance(said, (SystemicError, ObjectRefused))


def confirmed(said: NanoVLLMError, probed: NanoVLLMError | None) -> NanoVLLMError:
    """The error of an object of which the store ``said`` what `needs_probe`, given its answer for ``PROBE_KEY``."""
    if isinstance(probed, SystemicError) and isinstance(said, SystemicError):
        return said
    if isinstance(probed, (SystemicError, TransientError)) and not isinstance(probed, ObjectUnavailable):
        return FetchFailed(str(said))  # the circuit breaker counts it
    return ObjectRefused(f"{said}; this object alone: others are answered")
