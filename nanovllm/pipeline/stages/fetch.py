"""The fetch stage: a job's images as encoded bytes, through the image cache, the circuit breaker and bucket holds."""

from __future__ import annotations

from functools import partial

from nanovllm.engine.backends.base import EngineBackend
from nanovllm.messages.job import ImageRef, Job
from nanovllm.objects.fetch import FetchedImage
from nanovllm.pipeline.failure.bucket_holds import BucketHeldError, BucketHolds
from nanovllm.pipeline.failure.circuit_breaker import CircuitBreaker
from nanovllm.pipeline.stages.admit import AdmittedJob, decoded_bytes
from nanovllm.pipeline.stages.caches import ImageCache
from nanovllm.pipeline.stages.retry import Retry, gather

OBJECT_STORE = "object store"


class Fetch:
    """Fetches the images of jobs; each object is attempted ``max_attempts`` times."""

    def __init__(
        self,
        images: ImageCache,
        breaker: CircuitBreaker,
        holds: BucketHolds,
        retry: Retry,
        engine: EngineBackend,
        *,
        max_attempts: int,
    ) -> None:
        self._images = images
        self._breaker = breaker
        self._holds = holds
        self._retry = retry
        self._engine = engine
        self._max_attempts = max_attempts

    async def __call__(self, job: Job, admitted: AdmittedJob) -> list[FetchedImage]:
        """The encoded images of ``job``, in order; its reservation shrinks to their size.

        Raises:
            NanoVLLMError, ExceptionGroup: an object cannot be had, or is not what the job names.
        """
        with admitted.context.progress.stage("fetch"):
            fetched = await self._fetch(admitted)
            pixels = decoded_bytes(self._engine.image_transform, len(admitted.refs))
            admitted.reservation.resize(sum(len(image.data) for image in fetched) + pixels)
            return fetched

    async def _fetch(self, admitted: AdmittedJob) -> list[FetchedImage]:
        progress, tenant = admitted.context.progress, admitted.context.tenant
        buckets = {ref.bucket_and_key[0] for ref in admitted.refs if ref.data is None}
        while True:
            if any(self._holds.is_held(bucket, tenant) for bucket in buckets):
                # The jobs of other buckets need what this one would hold meanwhile.
                async with admitted.reservation.set_aside():
                    await self._holds.wait(buckets, tenant)
            try:
                return await gather(
                    self._retry(
                        partial(self._read, ref, admitted), OBJECT_STORE, progress, max_attempts=self._max_attempts
                    )
                    for ref in admitted.refs
                )
            except ExceptionGroup as group:
                _, others = group.split(BucketHeldError)
                if others is not None:
                    raise others from None

    async def _read(self, ref: ImageRef, admitted: AdmittedJob) -> FetchedImage:
        context = admitted.context
        fetch = partial(self._images.fetch, ref, context.salt, context.tenant, may_reuse=admitted.reuses_images)
        return await self._breaker.call(ref.identity, fetch)
