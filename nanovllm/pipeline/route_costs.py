"""Costs of routes: what their pages take here, measured by extracting synthetic documents as `extract` does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count, islice, pairwise
from typing import TypeVar

from nanovllm.engine.backends.base import EngineBackend
from nanovllm.errors import ConfigurationError
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.pipeline import build
from nanovllm.pipeline.build_documents import extraction_of
from nanovllm.pipeline.documents.extraction import DocumentSource, Extraction
from nanovllm.pipeline.documents.page_outputs import Ask
from nanovllm.pipeline.extract import asking, documents_at_once
from nanovllm.settings.routes import Route
from nanovllm.settings.worker import Settings

Name = TypeVar("Name")

ROUNDS = 3
"""Rounds of a measurement; their spread is shown beside its mean."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a page as measured, by rounds, the tokens of the answers, and how many pages have no whole one."""

    seconds_a_page: tuple[float, ...]
    answer_tokens: tuple[int, ...]
    incomplete_pages: int

    def of(self, pages: int) -> tuple[float, float, float]:
        """Seconds of so many pages: the mean, and of the quickest and slowest round."""
        times = self.seconds_a_page
        return pages * sum(times) / len(times), pages * min(times), pages * max(times)


def pages_at_once(settings: Settings, max_num_seqs: int, document_pages: int) -> int:
    """How many pages are asked at once where all documents have so many, of an engine that runs ``max_num_seqs``."""
    pages = documents_at_once(settings, max_num_seqs) * min(document_pages, settings.documents.pages_at_once)
    return min(pages, max_num_seqs)


def measure(
    engine: EngineBackend,
    routes: Mapping[Name, Route],
    settings: Settings,
    draw: Callable[[Sequence[int]], bytes],
    *,
    pages: int,
    document_pages: int,
) -> dict[Name, Cost]:
    """The cost of each of ``routes``: ``ROUNDS`` rounds of up to ``pages`` pages, in documents of ``document_pages``.

    ``draw`` makes a document from the numbers of its pages, of which none is given twice. One document of each route
    goes before and is not counted. ``engine`` is started, and closed at the end.

    Raises:
        ConfigurationError: a route cannot be extracted.
        NanoVLLMError: a document failed.
    """

    async def measure_all() -> dict[Name, Cost]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(engine)
            decoders = build.build_decoders(settings, engine)
            if decoders is None:
                raise ConfigurationError(f"the model {engine.model_info.id} takes no images: it reads no pages")
            stack.push_async_callback(decoders.close)
            await decoders.start()
            ask, at_once, numbers, costs = asking(engine), documents_at_once(settings, engine.max_num_seqs), count(), {}
            for name, route in routes.items():
                size = min(document_pages, route.pages.max_pages)
                drawn = (draw(list(islice(numbers, size))) for _ in count())
                extraction = extraction_of(route, settings, engine, decoders)
                costs[name] = await _measure(extraction, ask, drawn, max(1, pages // size), at_once)
            return costs

    return asyncio.run(measure_all())


async def _measure(extraction: Extraction, ask: Ask, drawn: Iterator[bytes], documents: int, at_once: int) -> Cost:
    slots = asyncio.Semaphore(at_once)

    async def extract(data: bytes) -> tuple[float, DocumentRecord]:
        async with slots:
            record = await extraction(data, DocumentSource("synthetic"), ask)
            return time.perf_counter(), record

    await extract(next(drawn))
    # Without a pause between rounds: starting and ending, an engine's batch is half empty.
    together = list(islice(drawn, ROUNDS * documents))
    began = time.perf_counter()
    ended, records = zip(*await asyncio.gather(*map(extract, together)), strict=True)
    answered = [page for record in records for page in record.pages]
    times = [began, *sorted(ended)[documents - 1 :: documents]]
    return Cost(
        tuple((end - start) * ROUNDS / len(answered) for start, end in pairwise(times)),
        tuple(page.tokens.output_tokens for page in answered if page.tokens is not None),
        sum(page.status != "ok" for page in answered),
    )
