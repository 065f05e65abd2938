"""Image embeddings of a step: those that its rows touch, encoded in one batch with some of waiting sequences."""

from __future__ import annotations

from collections import abc, defaultdict
from collections.abc import Iterable, Iterator
from math import prod

from torch import Tensor

from nanovllm.engine.config import EngineConfig
from nanovllm.engine.execution.model_runner import ModelRunner
from nanovllm.engine.scheduling.batch import ScheduledRow
from nanovllm.engine.scheduling.sequence import ImageSpan, Sequence
from nanovllm.vision.processor import VisionProcessor
from nanovllm.vision.timing import begin


def attach_image_embeddings(
    runner: ModelRunner, rows: abc.Sequence[ScheduledRow], upcoming: Iterable[tuple[Sequence, int]] = ()
) -> None:
    """Give every image that a row touches its embedding: from the cache, or encoded, all of one salt in one batch.

    Writes ``embedding`` and ``outcome`` of the sequences' image spans, and ``times.encodings``. The embeddings
    stay with the sequence until it has computed past them, so that no eviction can take them away between two
    chunks of its prompt. Images of ``upcoming``, which is `Scheduler.images_in_order`, fill the encoder's batch up and
    go to the cache.
    """
    needed = [
        (row.sequence, span)
        for row in rows
        for span in row.sequence.images
        if span.embedding is None and span.touches(row.start, row.end)
    ]
    if not needed:
        return
    processor = runner.processor
    assert processor is not None  # a sequence with images passed admission
    by_salt: dict[bytes, list[tuple[Sequence, ImageSpan]]] = defaultdict(list)
    for sequence, span in (*needed, *_encoded_ahead(processor, runner.config, [span for _, span in needed], upcoming)):
        by_salt[sequence.cache_salt].append((sequence, span))
    embeddings: dict[bytes, Tensor] = {}
    for salt, spans in by_salt.items():
        interval = begin(runner.device)
        embedded = processor.embed([span.image for _, span in spans], salt)
        interval.end()
        for (_, span), (embedding, outcome) in zip(spans, embedded, strict=True):
            embeddings[span.key] = embedding
            span.outcome = span.outcome or outcome
        for sequence in {sequence for sequence, _ in spans}:
            sequence.times.encodings += (interval,)
    for _, span in needed:
        span.embedding = embeddings[span.key]


def _encoded_ahead(
    processor: VisionProcessor,
    config: EngineConfig,
    needed: abc.Sequence[ImageSpan],
    upcoming: Iterable[tuple[Sequence, int]],
) -> Iterator[tuple[Sequence, ImageSpan]]:
    """The images of ``upcoming`` to encode along with the needed ones: the next distinct ones that the cache lacks.

    Encoded ahead are, with what the cache already holds of them, at most half of its bytes and what the needed ones
    leave. All of these are then its most recently used entries, so that this step evicts none of them.
    """
    encoder, cache = processor.encoder, processor.cache
    if encoder.batch_size == 1:
        return  # deterministic: nothing is gained
    row_bytes = encoder.width * encoder.dtype.itemsize
    lengths = {span.key: span.length for span in needed}
    capacity = config.embedding_cache_bytes
    free_bytes = min(capacity // 2, capacity - sum(lengths.values()) * row_bytes)
    pixels = config.encoder_batch_pixels - sum(prod(span.image.size) for span in needed)
    for sequence, computed in upcoming:
        for span in sequence.images:
            if span.end <= computed or span.key in lengths or span.image.embedding is not None:
                continue
            lengths[span.key] = span.length
            free_bytes -= span.length * row_bytes
            if free_bytes < 0:
                return
            if not cache.touch(span.key):
                pixels -= prod(span.image.size)
                if pixels >= 0:
                    yield sequence, span
