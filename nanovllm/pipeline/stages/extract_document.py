"""The extract stage of an event: pages asked of the engine as requests like those of jobs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace

from nanovllm.engine.backends.base import Request
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.metrics import Metrics
from nanovllm.objects.reader import FetchedImage
from nanovllm.pipeline.admission.admission import Reservation
from nanovllm.pipeline.admission.tenant_shares import CHARS_PER_TOKEN, TokenRates
from nanovllm.pipeline.consuming.crash_guard import CrashGuard
from nanovllm.pipeline.documents.extraction import Extraction
from nanovllm.pipeline.documents.page_outputs import Ask, KeepOutputs, PageOutput, PageRequest
from nanovllm.pipeline.stages.admit import Admit, AdmittedJob
from nanovllm.pipeline.stages.infer import Infer
from nanovllm.pipeline.stages.observe import observe_inference
from nanovllm.pipeline.stages.route_event import RoutedEvent

ExtractRouted = Callable[[RoutedEvent, FetchedImage, AdmittedJob], Awaitable[DocumentRecord]]


class AdmitEvent:
    """Admits events: their place in the engine queue is the route's, and what they use is charged page by page."""

    def __init__(self, admit: Admit) -> None:
        self._admit = admit

    async def __call__(self, routed: RoutedEvent, reservation: Reservation) -> AdmittedJob:
        """Wait until the tenant has paid back what its earlier documents have used."""
        context = routed.context
        with context.progress.stage("admit"):
            queued = await self._admit.queue(0, routed.route.priority, context, reservation)
        refs, sampling = (routed.ref,), self._admit.sampling.defaults
        return AdmittedJob(context, reservation, queued, sampling, refs, reuses_images=False, reuses_responses=False)


@dataclass(frozen=True)
class AskEngine:
    """Asks the engine for the pages of one document; each request waits for a slot of the engine queue."""

    infer: Infer
    admitted: AdmittedJob
    rates: TokenRates
    metrics: Metrics

    async def __call__(self, request: PageRequest) -> PageOutput:
        """The engine's output. Raises as ``infer``."""
        context, sampling = self.admitted.context, request.sampling
        tokens = len(request.prompt) // CHARS_PER_TOKEN + (sampling.max_tokens or 0)
        queued = replace(self.admitted.queued, tokens=tokens)
        self.rates.charge(queued.tenant, queued.tokens)
        asked = Request(
            context.job_id,
            prompt=request.prompt,
            images=request.images,
            sampling=sampling,
            priority=queued.engine_priority,
            cache_salt=context.salt,
            chat_template_kwargs=request.chat_template_kwargs or None,
        )
        inference = await self.infer(asked, replace(self.admitted, queued=queued, sampling=sampling))
        observe_inference(self.metrics, inference.output)
        return PageOutput.of(inference.output)


class ExtractDocument:
    """Extracts documents by the routes of ``extractions``, by name; what ``store`` has asks no engine."""

    def __init__(
        self,
        extractions: Mapping[str, Extraction],
        infer: Infer,
        rates: TokenRates,
        metrics: Metrics,
        store: Callable[[Ask, str], KeepOutputs] | None,
        *,
        page_bytes: int,
    ) -> None:
        """``page_bytes``: those of the pages of a document that are at work at once."""
        self._extractions = extractions
        self._infer = infer
        self._rates = rates
        self._metrics = metrics
        self._store = store
        self._page_bytes = page_bytes

    async def __call__(self, routed: RoutedEvent, document: FetchedImage, admitted: AdmittedJob) -> DocumentRecord:
        """The document's record. Raises as `Extraction`."""
        context = admitted.context
        admitted.reservation.resize(len(document.data) + self._page_bytes)
        ask: Ask = AskEngine(self._infer, admitted, self._rates, self._metrics)
        if self._store is not None:
            # As the other caches: tenants share pages where tenants.share_caches says so.
            ask = self._store(ask, context.salt.decode())
        with context.progress.stage("infer"):
            return await self._extractions[routed.route.name](
                document.data,
                routed.source,
                ask,
                tenant=context.tenant,
                record=context.origin.source,
                fetched_s=context.progress.seconds.get("fetch", 0.0),
            )


class GuardDocuments:
    """Refuses documents that have ended as many workers as are allowed.

    Which page was at fault is not known: one that passes clears none of the others, the whole document does.
    """

    def __init__(self, extract: ExtractRouted, guard: CrashGuard) -> None:
        self._extract = extract
        self._guard = guard

    async def __call__(self, routed: RoutedEvent, document: FetchedImage, admitted: AdmittedJob) -> DocumentRecord:
        """As ``extract``. Raises CrashedWorker."""
        record = admitted.context.record
        with admitted.context.progress.stage("infer"):
            self._guard.check(record)
        try:
            extracted = await self._extract(routed, document, admitted)
        except Exception:  # not one that was cancelled: it may still be at fault
            self._guard.clear(record)
            raise
        self._guard.clear(record)
        return extracted
