"""Held buckets: where everything is refused for one reason, the reason is no job's, and the bucket's jobs wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from nanovllm.errors import NanoVLLMError, ObjectForbidden, ObjectUnavailable, SystemicError, TransientError
from nanovllm.messages.job import ImageRef
from nanovllm.objects.fetch import FetchedImage, ObjectFetcher

logger = logging.getLogger(__name__)

REFUSED_OBJECTS = 20
PROBE_INTERVAL_S = 3.0


@dataclass(eq=False)
class _Bucket:
    reason: str = ""
    refused: set[str] = field(default_factory=set)
    next_probe_at: float = 0.0


class BucketHolds:
    """Holds a bucket back once ``REFUSED_OBJECTS`` different objects were refused for one reason, none read between.

    One job asks every ``PROBE_INTERVAL_S`` whether that has ended; the first answer that is no refusal ends it. Other
    buckets go on. ``changed`` is told what is held back, and why.
    """

    def __init__(
        self, changed: Callable[[tuple[str, ...]], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._report = changed
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}
        self._released = asyncio.Event()

    def is_held(self, bucket: str) -> bool:
        """Whether the jobs of ``bucket`` wait."""
        return bucket in self._buckets and len(self._buckets[bucket].refused) >= REFUSED_OBJECTS

    async def wait(self, buckets: Iterable[str]) -> None:
        """Return when none of ``buckets`` is held, or when it is this caller's turn to ask."""
        for bucket in buckets:
            while self.is_held(bucket):
                left_s = self._buckets[bucket].next_probe_at - self._clock()
                if left_s <= 0:
                    self._buckets[bucket].next_probe_at = self._clock() + PROBE_INTERVAL_S
                    break
                self._released.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await self._released.wait()

    def refused(self, bucket: str, what: str, error: NanoVLLMError) -> bool:
        """The store refused the object ``what`` of ``bucket``; returns whether the bucket is held back now."""
        entry, was_held, reason = self._buckets.setdefault(bucket, _Bucket()), self.is_held(bucket), str(error)
        if reason != entry.reason and not was_held:
            entry.reason, entry.refused = reason, set()
        if not was_held:
            entry.refused.add(what)
            if self.is_held(bucket):
                entry.next_probe_at = self._clock() + PROBE_INTERVAL_S
                logger.error("s3://%s is held back: %s, for %d objects in a row", bucket, reason, REFUSED_OBJECTS)
                self._tell()
        return self.is_held(bucket)

    def answered(self, bucket: str) -> None:
        """The store gave an object of ``bucket``, or what concerns that object alone."""
        was_held = self.is_held(bucket)
        self._buckets.pop(bucket, None)
        if was_held:
            logger.info("s3://%s can be read again", bucket)
            self._released.set()
            self._tell()

    def _tell(self) -> None:
        held = ((name, entry.reason) for name, entry in self._buckets.items() if self.is_held(name))
        self._report(tuple(f"s3://{name} is held back: {reason}" for name, reason in sorted(held)))


class BucketHeldError(Exception):
    """An object was refused as everything in its bucket is; its job waits for the bucket."""


class WatchedFetcher:
    """An object fetcher that tells ``holds`` what the store answered; below the image cache, which asks nothing."""

    def __init__(self, fetcher: ObjectFetcher, holds: BucketHolds) -> None:
        self._fetcher = fetcher
        self._holds = holds
        self.check = fetcher.check
        self.checked = fetcher.checked

    async def fetch(self, ref: ImageRef, *, held: FetchedImage | None = None) -> FetchedImage:
        """As `ObjectFetcher.fetch`. Raises BucketHeldError where the object's bucket is held back."""
        if ref.data is not None:
            return await self._fetcher.fetch(ref)
        bucket, _ = ref.bucket_and_key
        try:
            image = await self._fetcher.fetch(ref, held=held)
        except (ObjectForbidden, ObjectUnavailable) as error:
            if self._holds.refused(bucket, ref.identity, error):
                raise BucketHeldError from error
            raise
        except (TransientError, SystemicError):
            raise  # nothing is known about the bucket
        except NanoVLLMError:
            self._holds.answered(bucket)
            raise
        self._holds.answered(bucket)
        return image
