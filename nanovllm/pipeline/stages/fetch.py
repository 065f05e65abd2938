"""The fetch stage: a job's images as encoded bytes, through the image cache, the circuit breaker and bucket holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from nanovllm.engine.backends.base import EngineBackend
from nanovllm.messages.job import ImageRef
from nanovllm.objects.reader import FetchedImage
from nanovllm.pipeline.admission.fetch_shares import FetchShares
from nanovllm.pipeline.failure.bucket_holds import BucketHeldError, BucketHolds
from nanovllm.pipeline.failure.circuit_breaker import CircuitBreaker
from nanovllm.pipeline.stages.admit import AdmittedJob, decoded_bytes
from nanovllm.pipeline.stages.caches import ImageCache
from nanovllm.pipeline.stages.retry import Retry, gather

OBJECT_STORE = "object store"
IMAGE_HOST = "image host"


class Fetch:
    """Fetches the images of jobs, behind the wait for connections and bytes; ``max_attempts`` at each object."""

    def __init__(
        self,
        images: ImageCache,
        *,
        breaker: CircuitBreaker,
        holds: BucketHolds,
        retry: Retry,
        engine: EngineBackend,
        max_attempts: int,
        max_bytes: int,
        shares: FetchShares | None,
    ) -> None:
        """``max_bytes``: of one object; ``shares``: of the connections, None where all jobs are one tenant's."""
        self._images = images
        self._breaker = breaker
        self._holds = holds
        self._retry = retry
        self._engine = engine
        self._max_attempts = max_attempts
        self._max_bytes = max_bytes
        self._shares = shares

    async def __call__(self, admitted: AdmittedJob) -> list[FetchedImage]:
        """The encoded images of a job, in order; its reservation shrinks to their size.

        Raises:
            NanoVLLMError, ExceptionGroup: an object cannot be had, or is not what the job names.
        """
        if not admitted.refs:
            return []
        progress, tenant, reservation = admitted.context.progress, admitted.context.tenant, admitted.reservation
        objects = [ref for ref in admitted.refs if ref.data is None]
        buckets = {ref.address.store for ref in objects if not ref.is_http}
        pixels = decoded_bytes(self._engine.image_transform, len(admitted.refs))
        while True:
            if any(self._holds.is_held(bucket, tenant) for bucket in buckets):
                with progress.stage("fetch"), reservation.without_slot():
                    await self._holds.wait(buckets, tenant)
            async with self._share(len(objects), admitted) as at_once:
                with progress.stage("admit"):
                    await reservation.acquire_bytes(self._most_bytes(admitted.refs, pixels))
                with progress.stage("fetch"):
                    try:
                        fetched = await self._read_all(admitted, at_once)
                    except ExceptionGroup as group:
                        _, others = group.split(BucketHeldError)
                        if others is not None:
                            raise others from None
                        # The jobs of other buckets need what this one would hold meanwhile.
                        reservation.give_bytes_back()
                        continue
            reservation.resize(sum(len(image.data) for image in fetched) + pixels)
            return fetched

    @asynccontextmanager
    async def _share(self, objects: int, admitted: AdmittedJob) -> AsyncIterator[int]:
        """Hold the job's part of its tenant's share inside, and yield how many objects may be read at once."""
        if self._shares is None or not objects:
            yield max(1, objects)
            return
        context = admitted.context
        with context.progress.stage("admit"):
            taken = await self._shares.take(context.tenant, objects, admitted.queued.lane, admitted.reservation)
        try:
            yield taken
        finally:
            self._shares.give_back(context.tenant, taken)

    def _most_bytes(self, refs: Sequence[ImageRef], pixels: int) -> int:
        """Bytes to reserve: the sizes of objects are unknown until they are read."""
        most = pixels + sum(self._max_bytes if ref.data is None else len(ref.data) for ref in refs)
        return most if self._shares is None else min(most, self._shares.most_bytes)

    async def _read_all(self, admitted: AdmittedJob, at_once: int) -> list[FetchedImage]:
        slots, progress = asyncio.Semaphore(at_once), admitted.context.progress
        return await gather(
            self._retry(
                partial(self._read, ref, admitted, slots),
                IMAGE_HOST if ref.is_http else OBJECT_STORE,
                progress,
                max_attempts=self._max_attempts,
            )
            for ref in admitted.refs
        )

    async def _read(self, ref: ImageRef, admitted: AdmittedJob, slots: asyncio.Semaphore) -> FetchedImage:
        context = admitted.context
        fetch = partial(self._images.fetch, ref, context.salt, context.tenant, may_reuse=admitted.reuses_images)
        async with slots:
            if ref.is_http:
                return await fetch()  # a host that fails says nothing about the store, nor about other hosts
            return await self._breaker.call(ref.identity, fetch)
