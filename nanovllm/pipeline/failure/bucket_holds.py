"""Held buckets: where everything is refused for one reason, the reason is no job's, and the bucket's jobs wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from nanovllm.errors import NanoVLLMError, ObjectForbidden, ObjectUnavailable, SystemicError, TransientError
from nanovllm.messages.job import ImageRef
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.objects.reader import FetchedImage, ObjectHead

logger = logging.getLogger(__name__)

T = TypeVar("T")

REFUSED_OBJECTS = 20
PROBE_INTERVAL_S = 3.0
MAX_TENANTS = 10_000
"""Most pairs of a bucket and a tenant that refusals are remembered of; tenants come from the headers of jobs."""

MAX_TOLD_TENANTS = 20


@dataclass(eq=False)
class _Refusals:
    reason: str = ""
    keys: set[str] = field(default_factory=set)
    next_probe_at: float = 0.0

    @property
    def are_all(self) -> bool:
        return len(self.keys) >= REFUSED_OBJECTS

    def add(self, key: str, reason: str) -> None:
        if self.are_all:
            return
        if reason != self.reason:
            self.reason, self.keys = reason, set()
        self.keys.add(key)


class BucketHolds:
    """Holds a bucket back from a tenant once ``REFUSED_OBJECTS`` different objects were refused, none read between.

    They were refused for one reason and asked for by this tenant, or by all tenants together: then the bucket is held
    back from each that was refused itself. A tenant's refusals so never hold up another that can read. One job of the
    tenant asks every ``PROBE_INTERVAL_S`` whether that has ended; the first answer that is no refusal ends it. Other
    buckets go on. A bucket is named with its scheme, ``s3://bucket``. ``changed`` is told what is held back and why:
    from all jobs (there are no tenants), and from some.
    """

    def __init__(
        self,
        changed: Callable[[tuple[str, ...], tuple[str, ...]], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report = changed
        self._clock = clock
        self._by_bucket: dict[str, _Refusals] = {}
        self._by_tenant: OrderedDict[tuple[str, str], _Refusals] = OrderedDict()
        self._released = asyncio.Event()

    def is_held(self, bucket: str, tenant: str = "") -> bool:
        """Whether the jobs of ``tenant`` that read ``bucket`` wait."""
        own = self._by_tenant.get((bucket, tenant))
        return own is not None and (own.are_all or self._by_bucket[bucket].are_all)

    async def wait(self, buckets: Iterable[str], tenant: str = "") -> None:
        """Return when none of ``buckets`` is held from ``tenant``, or when it is this caller's turn to ask."""
        for bucket in buckets:
            while self.is_held(bucket, tenant):
                own = self._by_tenant[bucket, tenant]
                left_s = own.next_probe_at - self._clock()
                if left_s <= 0:
                    own.next_probe_at = self._clock() + PROBE_INTERVAL_S
                    break
                self._released.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await self._released.wait()

    def refused(self, bucket: str, key: str, error: NanoVLLMError, tenant: str = "") -> bool:
        """The store refused an object to ``tenant``; returns whether its bucket is held back from the tenant now."""
        own = self._by_tenant.setdefault((bucket, tenant), _Refusals())
        everyone = self._by_bucket.setdefault(bucket, _Refusals())
        self._by_tenant.move_to_end((bucket, tenant))
        before = own.are_all, everyone.are_all
        own.add(key, str(error))
        everyone.add(key, str(error))
        if not any(before) and self.is_held(bucket, tenant):
            own.next_probe_at = self._clock() + PROBE_INTERVAL_S
            logger.error("%s, for %d objects in a row", _described(bucket, tenant, own), REFUSED_OBJECTS)
        if (own.are_all, everyone.are_all) != before or (everyone.are_all and len(own.keys) == 1):
            self._tell()
        if len(self._by_tenant) > MAX_TENANTS:
            _, forgotten = self._by_tenant.popitem(last=False)
            if forgotten.are_all:
                self._released.set()
                self._tell()
        return self.is_held(bucket, tenant)

    def answered(self, bucket: str, tenant: str = "") -> None:
        """The store gave an object of ``bucket`` to ``tenant``, or said what concerns that object alone."""
        was_held = self.is_held(bucket, tenant)
        own = self._by_tenant.pop((bucket, tenant), None)
        everyone = self._by_bucket.get(bucket)
        if everyone is not None:
            # Kept as long as tenants have refusals of their own: they are counted on.
            was_held |= everyone.are_all
            self._by_bucket[bucket] = _Refusals()
        if was_held:
            if own is not None:
                logger.info("%s can be read again", bucket)
            self._released.set()
            self._tell()

    def _tell(self) -> None:
        held = sorted(pair for pair in self._by_tenant if self.is_held(*pair))
        from_all, from_some = (
            tuple(_described(*pair, self._by_tenant[pair]) for pair in held if bool(pair[1]) is is_tenant)
            for is_tenant in (False, True)
        )
        more = len(from_some) - MAX_TOLD_TENANTS
        self._report(from_all, from_some if more <= 0 else (*from_some[:MAX_TOLD_TENANTS], f"and from {more} others"))


def _described(bucket: str, tenant: str, refusals: _Refusals) -> str:
    whom = f" from the jobs of tenant {tenant[:100]!r}" if tenant else ""
    return f"{bucket} is held back{whom}: {refusals.reason}"


class BucketHeldError(Exception):
    """An object was refused as everything in its bucket is; its job waits for the bucket."""


class WatchedFetcher:
    """An object fetcher that tells ``holds`` what the store answered; below the image cache, which asks nothing."""

    def __init__(self, fetcher: ObjectFetcher, holds: BucketHolds) -> None:
        self._fetcher = fetcher
        self._holds = holds
        self.check = fetcher.check
        self.checked = fetcher.checked

    async def fetch(self, ref: ImageRef, *, held: FetchedImage | None = None, tenant: str = "") -> FetchedImage:
        """As `ObjectFetcher.fetch`. Raises BucketHeldError where the object's bucket is held back from ``tenant``."""
        if ref.data is not None or ref.is_http:
            return await self._fetcher.fetch(ref, held=held)
        return await self._watch(ref, self._fetcher.fetch(ref, held=held), tenant)

    async def head(self, ref: ImageRef, tenant: str = "") -> ObjectHead:
        """As `ObjectFetcher.head`. Raises BucketHeldError as ``fetch``."""
        return await self._watch(ref, self._fetcher.head(ref), tenant)

    async def _watch(self, ref: ImageRef, asked: Awaitable[T], tenant: str) -> T:
        bucket, key = ref.address.store, ref.address.key
        try:
            answer = await asked
        except (ObjectForbidden, ObjectUnavailable) as error:
            if self._holds.refused(bucket, key, error, tenant):
                raise BucketHeldError from error
            raise
        except (TransientError, SystemicError):
            raise  # nothing is known about the bucket
        except NanoVLLMError:
            self._holds.answered(bucket, tenant)
            raise
        self._holds.answered(bucket, tenant)
        return answer
