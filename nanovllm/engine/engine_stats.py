"""The engine's figures: a snapshot of its queues, caches and counters."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.statistics import EngineStats
from nanovllm.vision.processor import VisionProcessor


@dataclass
class StepCounts:
    """What the steps so far have computed: their number, tokens of prompts, and tokens generated."""

    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


def collect_stats(scheduler: Scheduler, processor: VisionProcessor | None, counts: StepCounts) -> EngineStats:
    """The figures by now; ``processor`` is None where the engine sees no images."""
    encoder = processor.encoder if processor else None
    return EngineStats(
        num_requests_running=len(scheduler.running),
        num_requests_waiting=len(scheduler.waiting),
        kv_cache_usage=scheduler.blocks.usage,
        num_preemptions=scheduler.num_preemptions,
        steps=counts.steps,
        prompt_tokens=counts.prompt_tokens,
        generation_tokens=counts.generation_tokens,
        prefix_cache_queries=scheduler.prefix_cache_queries,
        prefix_cache_hits=scheduler.prefix_cache_hits,
        spec_decode_draft_tokens=scheduler.prompt_lookup.num_drafted,
        spec_decode_accepted_tokens=scheduler.prompt_lookup.num_accepted,
        encoder_images=encoder.images_encoded if encoder else 0,
        encoder_seconds=encoder.encode_seconds if encoder else 0.0,
        image_seconds=encoder.encode_seconds if encoder else 0.0,
        embedding_cache=processor.cache.stats() if processor else None,
    )
