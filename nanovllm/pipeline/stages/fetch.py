"""The fetch stage: a job's images as encoded bytes, through the image cache and the circuit breaker."""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial

from nanovllm.engine.backends.base import EngineBackend
from nanovllm.messages.job import ImageRef, Job
from nanovllm.objects.fetch import FetchedImage
from nanovllm.pipeline.failure.circuit_breaker import CircuitBreaker
from nanovllm.pipeline.stages.admit import AdmittedJob, decoded_bytes
from nanovllm.pipeline.stages.caches import ImageCache
from nanovllm.pipeline.stages.retry import Retry, gather

OBJECT_STORE = "object store"


class Fetch:
    """Fetches the images of jobs; each object is attempted ``max_attempts`` times."""

    def __init__(
        self, images: ImageCache, breaker: CircuitBreaker, retry: Retry, engine: EngineBackend, *, max_attempts: int
    ) -> None:
        self._images = images
        self._breaker = breaker
        self._retry = retry
        self._engine = engine
        self._max_attempts = max_attempts

    async def __call__(self, job: Job, admitted: AdmittedJob) -> list[FetchedImage]:
        """The encoded images of ``job``, in order; its reservation shrinks to their size.

        Raises:
            NanoVLLMError, ExceptionGroup: an object cannot be had, or is not what the job names.
        """
        context = admitted.context
        with context.progress.stage("fetch"):

            def attempt(ref: ImageRef) -> Awaitable[FetchedImage]:
                fetch = partial(self._images.fetch, ref, context.salt, may_reuse=admitted.reuses_images)
                return self._breaker.call(ref.identity, fetch)

            fetched = await gather(
                self._retry(partial(attempt, ref), OBJECT_STORE, context.progress, max_attempts=self._max_attempts)
                for ref in admitted.refs
            )
            pixels = decoded_bytes(self._engine.image_transform, len(admitted.refs))
            admitted.reservation.resize(sum(len(image.data) for image in fetched) + pixels)
            return fetched
