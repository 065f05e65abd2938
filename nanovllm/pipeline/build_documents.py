"""The objects of a worker that makes records of documents; absent where no routes are set."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.util import find_spec

from nanovllm.engine.backends.base import EngineBackend
from nanovllm.errors import ConfigurationError
from nanovllm.metrics import Metrics
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.objects.s3_client import S3Client
from nanovllm.pipeline.admission.tenant_shares import TokenRates
from nanovllm.pipeline.consuming.crash_guard import CrashGuard
from nanovllm.pipeline.documents.extraction import Extraction
from nanovllm.pipeline.documents.model_profile import heeded_sampling, served_profile
from nanovllm.pipeline.documents.page_outputs import Ask, KeepOutputs
from nanovllm.pipeline.documents.page_store import PageStore
from nanovllm.pipeline.documents.page_task import PageTask, page_task
from nanovllm.pipeline.documents.sidecars import Sidecars
from nanovllm.pipeline.events.order import is_newer_version
from nanovllm.pipeline.failure.bucket_holds import BucketHolds, WatchedFetcher
from nanovllm.pipeline.failure.circuit_breaker import CircuitBreaker
from nanovllm.pipeline.operations.health import Health
from nanovllm.pipeline.operations.recent_jobs import RecentJobs
from nanovllm.pipeline.routing.routes import Routes, load_routes
from nanovllm.pipeline.stages.admit import Admit, decoded_bytes, sampling_defaults
from nanovllm.pipeline.stages.answer_document import AnswerDocument
from nanovllm.pipeline.stages.ask_store import AskStore
from nanovllm.pipeline.stages.caches import ImageCache
from nanovllm.pipeline.stages.context import Progress
from nanovllm.pipeline.stages.extract_document import AdmitEvent, ExtractDocument, ExtractRouted, GuardDocuments
from nanovllm.pipeline.stages.failure import DeadLetterLimit, Failure
from nanovllm.pipeline.stages.fetch import Fetch
from nanovllm.pipeline.stages.fetch_document import FetchDocument
from nanovllm.pipeline.stages.infer import Infer
from nanovllm.pipeline.stages.observe import observe_event
from nanovllm.pipeline.stages.process_events import EventStages
from nanovllm.pipeline.stages.publish import Publish
from nanovllm.pipeline.stages.record_builder import RecordBuilder
from nanovllm.pipeline.stages.retry import Retry
from nanovllm.pipeline.stages.route_event import RouteEvent
from nanovllm.settings.documents import DocumentSettings
from nanovllm.settings.routes import Route
from nanovllm.settings.worker import Settings
from nanovllm.sinks.base import Sink
from nanovllm.sinks.claim_check import S3ResultStore
from nanovllm.vision.documents.pages import DocumentLimits
from nanovllm.vision.images.pool import DecoderPool

logger = logging.getLogger(__name__)

WHOLE_PAGE_TASKS = frozenset({"text", "markdown", "tables"})
"""Tasks whose answers are as long as their page."""


@dataclass(frozen=True)
class DocumentParts:
    """What the stages of documents share with those of jobs; ``make_fetch`` makes a fetch stage."""

    engine: EngineBackend
    decoders: DecoderPool | None
    fetcher: ObjectFetcher
    breaker: CircuitBreaker
    holds: BucketHolds
    admit: Admit
    rates: TokenRates
    infer: Infer
    builder: RecordBuilder
    sink: Sink
    large_results: S3ResultStore | None
    limit: DeadLetterLimit
    retry: Retry
    failure: Failure
    publish: Publish
    metrics: Metrics
    health: Health
    recent: RecentJobs
    crash_guard: CrashGuard | None
    make_fetch: Callable[..., Fetch]


def worker_routes(settings: Settings) -> Routes | None:
    """The routes of a worker; None where none are set. Raises InvalidRoutes."""
    path = settings.documents.routes
    return None if path is None else load_routes(path)


def extraction_of(route: Route, settings: Settings, engine: EngineBackend, decoders: DecoderPool) -> Extraction:
    """The extraction of a route, for a worker and without one. Raises as `Extraction`."""
    model = served_profile(settings)
    of_profile = heeded_sampling(model.of(route), engine.capabilities.sampling)
    task = page_task(route, model)
    if warning := short_answers(route, task, {*of_profile, *engine.generation_defaults}, settings):
        logger.warning("route %s: %s", route.name, warning)
    return Extraction(
        route,
        decoders,
        engine.model_info,
        sampling_defaults(settings, engine.generation_defaults, of_profile),
        worker=settings.worker_id,
        task=task,
        pages_at_once=settings.documents.pages_at_once,
        fits=engine.fits,
        logprobs=engine.capabilities.logprobs is not None,
        beginning=engine.beginning,
    )


def short_answers(route: Route, task: PageTask, stated: Collection[str], settings: Settings) -> str | None:
    """Why a route of whole pages gets their beginnings alone: nobody says ``max_tokens``; None where somebody does.

    ``stated`` are the names of sampling parameters that the model's profile and checkpoint give.
    """
    own = settings.sampling
    if route.task not in WHOLE_PAGE_TASKS or "max_tokens" in {*task.sampling, *stated, *own.model_fields_set}:
        return None
    return (
        f"answers end after {own.max_tokens} tokens, the default, and a dense page takes thousands: set the route's "
        "sampling.max_tokens"
    )


def build_event_stages(settings: Settings, routes: Routes, parts: DocumentParts) -> EventStages:
    """The stages of events.

    Raises:
        ConfigurationError: the model takes no images, or the extra ``documents`` is not installed.
        UnsupportedConstraint: a route's schema cannot be validated against.
    """
    engine, decoders, retry = parts.engine, parts.decoders, parts.retry
    if decoders is None:
        raise ConfigurationError(f"the model {engine.model_info.id} takes no images: it reads no pages")
    extractions = {entry.route.name: extraction_of(entry.route, settings, engine, decoders) for entry in routes.entries}
    client, attempts = S3Client(settings.s3), settings.s3.max_attempts
    ask = AskStore(parts.breaker, retry, max_attempts=attempts)
    fetcher = parts.fetcher.for_documents(settings.documents.max_bytes, routes.buckets)
    watched = WatchedFetcher(fetcher, parts.holds)
    documents = ImageCache(watched, None, engine.find_image, parts.metrics, max_bytes=0)
    sidecars = Sidecars(client.call, is_newer_version)
    store = None
    if routes.page_store is not None:
        pages = PageStore(
            routes.page_store,
            client.call,
            # Without an end: no document is at fault where it fails.
            attempt=lambda request: retry(request, "page store", Progress(time.monotonic())),
        )
        parts.metrics.watch_page_store(lambda: asdict(pages.counts))
        store = partial(_kept, pages, engine)
    extract: ExtractRouted = ExtractDocument(
        extractions,
        parts.infer,
        parts.rates,
        parts.metrics,
        store,
        page_bytes=decoded_bytes(engine.image_transform, settings.documents.pages_at_once),
    )
    if parts.crash_guard is not None:
        extract = GuardDocuments(extract, parts.crash_guard)
    return EventStages(
        route=RouteEvent(routes, watched, parts.holds, ask),
        admit=AdmitEvent(parts.admit),
        fetch=FetchDocument(
            parts.make_fetch(documents, max_bytes=settings.documents.max_bytes),
            fetcher,
            sidecars,
            engine.model_info,
            ask,
            retry,
            max_attempts=attempts,
        ),
        extract=extract,
        answer=AnswerDocument(parts.builder, parts.sink, sidecars, parts.large_results, parts.limit, ask, retry),
        failure=parts.failure,
        publish=parts.publish.together,
        observe=partial(observe_event, parts.metrics, parts.health, parts.recent),
    )


def check_extra(extra: str) -> None:
    """Find out whether documents can be read and records validated; ``extra`` is what the engine needs beside.

    Raises:
        ConfigurationError: they cannot.
    """
    missing = [name for name in ("pypdfium2", "jsonschema_rs") if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"documents.routes needs {' and '.join(missing)}: pip install '.[{extra},documents]' in a clone"
        )


def document_limits(documents: DocumentSettings) -> DocumentLimits:
    """The limits of a document."""
    return DocumentLimits(**{limit.name: getattr(documents, limit.name) for limit in fields(DocumentLimits)})


def _kept(store: PageStore, engine: EngineBackend, ask: Ask, tenant: str) -> KeepOutputs:
    return KeepOutputs(ask, store, engine.model_info, engine.output_options, tenant=tenant)
