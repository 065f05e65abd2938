"""Extraction without Kafka: documents of files and prefixes through the routes of a worker, record by record."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from nanovllm.confinement import forbid_debugging
from nanovllm.engine.backends.base import EngineBackend, Request
from nanovllm.errors import (
    ConfigurationError,
    EndpointsUnavailable,
    NanoVLLMError,
    SystemicError,
    UnsupportedConstraint,
)
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.objects.s3_client import S3Client
from nanovllm.pipeline import build
from nanovllm.pipeline.app import prepare_threads
from nanovllm.pipeline.build_documents import extraction_of
from nanovllm.pipeline.documents.extraction import DocumentSource, Extraction
from nanovllm.pipeline.documents.page_answers import MAX_LEAVES
from nanovllm.pipeline.documents.page_outputs import Ask, KeepOutputs, PageOutput, PageRequest
from nanovllm.pipeline.documents.page_store import PageStore
from nanovllm.pipeline.documents.schema_parts import split_schema
from nanovllm.pipeline.documents.sidecars import Sidecars
from nanovllm.pipeline.failure.backoff import Backoff
from nanovllm.pipeline.operations import yielding_loop
from nanovllm.pipeline.operations.log import log_to_stderr
from nanovllm.pipeline.operations.stop_signals import FAILED, StopSignals
from nanovllm.pipeline.operations.ticking import tick
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings.routes import Route
from nanovllm.settings.worker import Settings

logger = logging.getLogger(__name__)

TICK_S = 0.25


@dataclass(frozen=True)
class FoundDocument:
    """A document and the route that takes it; ``read`` returns its bytes, and blocks."""

    source: DocumentSource
    route: Route
    read: Callable[[], bytes]


def extract_documents(
    settings: Settings,
    documents: Sequence[FoundDocument],
    on_record: Callable[[DocumentRecord], None],
    on_failure: Callable[[FoundDocument, NanoVLLMError], None],
    on_same: Callable[[FoundDocument], None],
    *,
    page_store: str | None = None,
    with_sidecars: bool = False,
    on_tick: Callable[[], object] = lambda: None,
) -> bool:
    """Extract every one of ``documents``; False where a signal ended the work before the end.

    ``with_sidecars``: sidecars are written, and a document that has one of its version and route is not read;
    ``on_same`` is told. ``page_store`` is the ``s3://bucket/prefix`` of finished pages; None: none are kept.
    The first SIGINT or SIGTERM lets the documents at work end and begins no more.

    Raises:
        ConfigurationError: the engine cannot be made, or takes no images; a route asks for what is not implemented.
        UnsupportedConstraint: the engine cannot enforce the schema of a route.
        SystemicError: the surroundings allow no further document.
    """
    signals = StopSignals(code_before_work=FAILED)
    forbid_debugging()
    prepare_threads()
    log_to_stderr("warning" if settings.log_level == "info" else settings.log_level, settings.log_format)
    work = _extract_all(
        settings, documents, on_record, on_failure, on_same, page_store, with_sidecars, on_tick, signals
    )
    return yielding_loop.run(work, beside_engine=settings.engine.loads_model)


def documents_at_once(settings: Settings, max_num_seqs: int) -> int:
    """As many documents as fill the engine's batch where each has as many pages as are asked at once."""
    return max(1, max_num_seqs // settings.documents.pages_at_once)


async def _extract_all(
    settings: Settings,
    documents: Sequence[FoundDocument],
    on_record: Callable[[DocumentRecord], None],
    on_failure: Callable[[FoundDocument, NanoVLLMError], None],
    on_same: Callable[[FoundDocument], None],
    page_store: str | None,
    with_sidecars: bool,
    on_tick: Callable[[], object],
    signals: StopSignals,
) -> bool:
    await asyncio.to_thread(build.check_parts, settings)
    async with build.started_parts(settings) as parts:
        if (decoders := parts.decoders) is None:
            raise ConfigurationError(f"the model {parts.engine.model_info.id} takes no images: it reads no pages")
        stopped = asyncio.Event()
        signals.hand_to(stopped.set, has_taken=lambda: True)
        extractions: dict[str, Extraction] = {}
        slots = asyncio.Semaphore(documents_at_once(settings, parts.engine.max_num_seqs))
        ask = asking(parts.engine)
        if page_store is not None:
            store = PageStore(page_store, S3Client(settings.s3).call)
            ask = KeepOutputs(ask, store, parts.engine.model_info, parts.engine.output_options)

        for route in {found.route.name: found.route for found in documents}.values():
            try:
                extractions[route.name] = extraction_of(route, settings, parts.engine, decoders)
                for sampling in _samplings(route):
                    if sampling.constraint is not None:
                        await parts.engine.compile(sampling.constraint)
            except UnsupportedConstraint as error:
                raise UnsupportedConstraint(f"route {route.name}: {error}") from None
        sidecars = Sidecars(S3Client(settings.s3).call) if with_sidecars else None

        async def extract(found: FoundDocument) -> None:
            try:
                if sidecars and await sidecars.beside(found.source, found.route, parts.engine.model_info) == "same":
                    on_same(found)
                    return
                began = time.monotonic()
                data = await asyncio.to_thread(found.read)
                fetched_s = time.monotonic() - began
                record = await extractions[found.route.name](data, found.source, ask, fetched_s=fetched_s)
                if sidecars:
                    await sidecars.put(record, found.source, found.route)
            except SystemicError:
                raise
            except NanoVLLMError as error:
                on_failure(found, error)
            else:
                on_record(record)
            finally:
                slots.release()

        ticking = asyncio.create_task(tick(on_tick, TICK_S), name="tick")
        try:
            async with asyncio.TaskGroup() as group:
                for found in documents:
                    await slots.acquire()
                    if stopped.is_set():
                        slots.release()
                        break
                    group.create_task(extract(found))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            ticking.cancel()
        return not stopped.is_set()


def _samplings(route: Route) -> Iterator[SamplingParams]:
    """The sampling of each request of a page: one, or one for each part of a wide schema."""
    if route.response_schema is None:
        yield SamplingParams(**route.sampling)
        return
    for part in split_schema(route.response_schema, MAX_LEAVES):
        yield SamplingParams(**route.sampling, json_schema=part)


def asking(engine: EngineBackend) -> Ask:
    """Asks the engine for each page; while no server of it answers, a page waits."""
    numbers, backoff = count(1), Backoff()

    async def attempt(request: PageRequest) -> PageOutput:
        generation = engine.submit(
            Request(
                f"page#{next(numbers)}",
                prompt=request.prompt,
                images=request.images,
                sampling=request.sampling,
                chat_template_kwargs=request.chat_template_kwargs or None,
            )
        )
        try:
            return PageOutput.of(await generation)
        finally:
            generation.abort()

    async def ask(request: PageRequest) -> PageOutput:
        failures = 0
        while True:
            try:
                return await attempt(request)
            except EndpointsUnavailable as error:
                logger.warning("waiting for the engine: %s", error.in_one_line)
            failures += 1
            await asyncio.sleep(backoff.wait_s(failures))

    return ask
