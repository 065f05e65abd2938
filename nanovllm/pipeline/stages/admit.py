"""The admit stage: what can be refused is refused before a byte is read; the rest waits for its tenant's rate."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from nanovllm.engine.backends.base import EngineBackend
from nanovllm.errors import InvalidInput, NanoVLLMError, counted
from nanovllm.messages.job import ImageRef, Job
from nanovllm.metrics import Metrics
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.pipeline.admission.admission import Reservation
from nanovllm.pipeline.admission.engine_queue import QueuedJob
from nanovllm.pipeline.admission.key_order import KeyTurn
from nanovllm.pipeline.admission.tenant_shares import CHARS_PER_TOKEN, TokenRates
from nanovllm.pipeline.stages.context import JobContext
from nanovllm.pipeline.stages.image_errors import of_image
from nanovllm.pipeline.stages.job_sampling import JobSampling
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings.worker import Settings
from nanovllm.value_object import value_object
from nanovllm.vision.images.preprocess import ImageTransform


@value_object
class AdmittedJob:
    """An admitted job: what it may hold and reuse, and how it stands in the engine queue."""

    context: JobContext
    reservation: Reservation
    queued: QueuedJob
    sampling: SamplingParams
    refs: tuple[ImageRef, ...]
    reuses_images: bool
    reuses_responses: bool


@dataclass(eq=False)
class Admit:
    """Admits jobs; ``lanes``: the priority of each topic."""

    settings: Settings
    sampling: JobSampling
    _: KW_ONLY
    engine: EngineBackend
    fetcher: ObjectFetcher
    rates: TokenRates
    lanes: dict[str, int]
    metrics: Metrics

    async def __call__(self, job: Job, context: JobContext, reservation: Reservation) -> AdmittedJob:
        """Wait for the tenant's token rate.

        Raises:
            NanoVLLMError: the job asks for what the model or the settings do not allow.
        """
        with context.progress.stage("admit"):
            job.check_template_kwargs(self.settings.engine.job_chat_template_kwargs)
            limit = self.settings.admission.max_tokens
            sampling = self.sampling.of(job)
            tokens = job.text_chars // CHARS_PER_TOKEN + (sampling.max_tokens or limit)
            queued = await self.queue(tokens, job.priority, context, reservation)
            refs = job.image_refs()
            self._check(refs)
        reuse = job.reuse or self.settings.reuse.level
        return AdmittedJob(context, reservation, queued, sampling, refs, reuse != "none", reuse == "answers")

    async def queue(self, tokens: int, asked: int, context: JobContext, reservation: Reservation) -> QueuedJob:
        """The place in the engine queue of what will use about ``tokens`` with priority ``asked``.

        Waits for the tenant's token rate, and charges it.
        """
        queued = self._queued(tokens, asked, context)
        if self.rates.wait_s(queued.tenant):
            with reservation.without_slot():
                await self.rates.pass_through(queued.tenant, queued.tokens)
        else:
            self.rates.charge(queued.tenant, queued.tokens)
        return queued

    def _queued(self, tokens: int, asked: int, context: JobContext) -> QueuedJob:
        bounds, lane = self.settings.admission, self.lanes.get(context.record.topic, 0)
        priority = bounds.clamped_priority(asked)
        if priority != asked:
            self.metrics.clamped_priorities.inc()
        # Inside the engine nothing knows of tenants: their jobs are equal there.
        own = 0 if self.settings.tenants.are_configured else priority
        in_engine = lane * (bounds.max_priority - bounds.min_priority + 1) + own
        return QueuedJob(tokens, priority, context.tenant, context.expires_at, lane, in_engine)

    def _check(self, refs: tuple[ImageRef, ...]) -> None:
        if refs and self.engine.image_transform is None:
            raise InvalidInput(f"the model {self.engine.model_info.id} takes no images")
        limit = self.settings.engine.max_images_per_request
        if len(refs) > limit:
            raise InvalidInput(f"the job has {counted(len(refs), 'image')}, above the limit of {limit}")
        for position, ref in enumerate(refs, 1):
            try:
                self.fetcher.check(ref)
            except NanoVLLMError as error:
                raise of_image(error, position, refs) from None


@dataclass(eq=False)
class AfterKeyTurn:
    """The admit stage behind every earlier job of the same record key (``admission.per_key_order``)."""

    turn: KeyTurn
    admit: Callable[[Job, JobContext, Reservation], Awaitable[AdmittedJob]]

    async def __call__(self, job: Job, context: JobContext, reservation: Reservation) -> AdmittedJob:
        """Wait until the earlier jobs of the key have ended, then admit."""
        with context.progress.stage("admit"):
            await self.turn.wait()
        return await self.admit(job, context, reservation)


def sampling_defaults(
    settings: Settings, of_checkpoint: Mapping[str, Any], of_profile: Mapping[str, Any] | None = None
) -> SamplingParams:
    """What counts where a job says nothing: ``settings.sampling``; what is unset there by profile, then checkpoint."""
    own = settings.sampling
    below = {**of_checkpoint, **(of_profile or {})}
    unset = {name: value for name, value in below.items() if name not in own.model_fields_set}
    if "max_tokens" in unset:
        unset["max_tokens"] = min(unset["max_tokens"], settings.admission.max_tokens)
    return own.model_copy(update=unset)


def decoded_bytes(transform: ImageTransform | None, images: int) -> int:
    """Bytes of ``images`` once prepared, as 8-bit RGB; 0 for models without a fixed size, which are counted later."""
    if transform is None or transform.output_size is None:
        return 0
    height, width = transform.output_size
    return images * height * width * 3
