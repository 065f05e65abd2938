"""The metrics message: where a job's time and tokens went."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from nanovllm.messages.base import CacheOutcome, FinishReason, Message, Reused, Source


class ImageMetrics(Message):
    """What the caches did for one image."""

    sha256: str
    cache: CacheOutcome
    tokens: int = Field(0, ge=0)


class JobMetrics(Message):
    """Figures of one answered job, under vLLM's per-request names where it has them. Schema `metrics.v1`."""

    schema_name: ClassVar[str] = "metrics.v1"

    version: Literal[1] = 1
    job_id: str
    result_id: str
    worker: str
    model: str
    source: Source
    finish_reason: FinishReason
    reused: Reused | None = Field(None, description="As in the result; the engine's figures are then 0.")
    num_prompt_tokens: int = Field(ge=0)
    num_generation_tokens: int = Field(ge=0)
    num_cached_tokens: int = Field(0, ge=0)
    num_image_tokens: int = Field(0, ge=0)
    queue_time_ms: float = Field(0.0, ge=0)
    time_to_first_token_ms: float = Field(0.0, ge=0)
    generation_time_ms: float = Field(0.0, ge=0)
    mean_itl_ms: float = Field(0.0, ge=0, description="Mean time between tokens.")
    e2e_time_ms: float = Field(0.0, ge=0, description="From receipt to the finished text.")
    tokens_per_second: float = Field(0.0, ge=0, description="Output tokens over generation time.")
    fetch_time_ms: float = Field(0.0, ge=0)
    prepare_time_ms: float = Field(0.0, ge=0)
    encode_time_ms: float = Field(0.0, ge=0)
    engine_seconds_spent: float = Field(0.0, ge=0, description="Encoder and model time charged to this job.")
    engine_seconds_saved: float = Field(0.0, ge=0, description="Estimate of what cached images and prefixes saved.")
    images: tuple[ImageMetrics, ...] = ()
