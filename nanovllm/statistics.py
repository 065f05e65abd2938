"""Statistics of an engine and its embedding cache: what metrics, results and `LLM.stats()` tell."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TierStats:
    """One tier: what it holds now, and the hits that it answered since the start."""

    name: str
    hits: int
    entries: int
    bytes: int
    max_bytes: int


@dataclass(frozen=True)
class CacheStats:
    """Counts since the start, and what is held now in all tiers together.

    ``joined`` waited for another's computation, or repeated it; ``hits_by_file`` of the ``hits`` were found by the
    file's bytes, before anything was decoded; ``evictions`` left the last tier; ``seconds_saved`` is what computing
    the hits and the joined anew would have taken, going by what each took once.
    """

    hits: int = 0
    misses: int = 0
    joined: int = 0
    evictions: int = 0
    entries: int = 0
    bytes: int = 0
    max_bytes: int = 0
    hits_by_file: int = 0
    seconds_saved: float = 0.0
    tiers: tuple[TierStats, ...] = ()


@dataclass(frozen=True)
class EndpointStats:
    """One server of an engine that asks servers: requests sent and faults by kind since the start, and its state."""

    url: str
    is_up: bool
    running: int = 0
    requests: int = 0
    faults: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine; ``prefix_cache_queries`` and ``prefix_cache_hits`` count tokens.

    ``image_seconds``: no text was computed, because images were preprocessed or in the tower.
    ``spec_decode_draft_tokens`` were guessed ahead, and ``spec_decode_accepted_tokens`` of them were right.
    """

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    spec_decode_draft_tokens: int = 0
    spec_decode_accepted_tokens: int = 0
    encoder_images: int = 0
    encoder_seconds: float = 0.0
    image_seconds: float = 0.0
    embedding_cache: CacheStats | None = None
    endpoints: tuple[EndpointStats, ...] = ()
