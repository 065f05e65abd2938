"""The prepare stage: encoded images to pixels, in decoder processes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from nanovllm.objects.reader import FetchedImage
from nanovllm.pipeline.stages.admit import AdmittedJob
from nanovllm.pipeline.stages.caches import ImageCache
from nanovllm.pipeline.stages.retry import Retry, gather
from nanovllm.vision.images.preprocess import PreparedImage


class Prepare:
    """Decodes and transforms the images of jobs, through the image cache."""

    def __init__(self, images: ImageCache, retry: Retry) -> None:
        self._images = images
        self._retry = retry

    async def __call__(self, fetched: Sequence[FetchedImage], admitted: AdmittedJob) -> tuple[PreparedImage, ...]:
        """The prepared images, in order; the job's reservation changes to their size.

        Raises:
            NanoVLLMError, ExceptionGroup: an image is broken or beyond the limits.
        """
        context = admitted.context
        with context.progress.stage("prepare"):
            prepare = partial(
                self._images.prepare, salt=context.salt, tenant=context.tenant, may_reuse=admitted.reuses_images
            )
            images = await gather(
                self._retry(partial(prepare, image), "image decoders", context.progress) for image in fetched
            )
            admitted.reservation.resize(sum(image.nbytes for image in images))
            return tuple(images)
