"""What the worker sends: results, metrics and dead letters, and the parts they are made of."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "loop", "abort"]
AnswerReuse = Literal["hit", "joined"]
CacheOutcome = Literal["hit", "joined", "miss", "prefix"]
DeadLetterClass = Literal["invalid", "permanent", "retries_exhausted", "expired"]
Stage = Literal["receive", "admit", "fetch", "prepare", "infer", "publish"]

_RESULT_NAMESPACE = uuid.UUID("6d1f3d0e-5b0a-5e0c-9d7e-0f6b6e616e6f")


def result_id_for(job_id: str) -> str:
    """The identity of a job's result: equal for every delivery and every worker, so that repeats can be dropped."""
    return str(uuid.uuid5(_RESULT_NAMESPACE, job_id))


class Message(BaseModel):
    """A part of an outgoing message. Readers ignore unknown fields: today's must take the messages of tomorrow."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Source(Message):
    """The record that a job came in."""

    topic: str
    partition: int = Field(ge=0)
    offset: int = Field(ge=0)
    timestamp_ms: int | None = Field(None, description="The record's timestamp, milliseconds since 1970.")


class ModelUse(Message):
    """What answered, exactly."""

    id: str = Field(description="Name of the checkpoint.")
    revision: str = Field(description="Revision of its files.")
    parameter_digest: str = Field(description="Digest of its parameters as loaded.")


class InputUse(Message):
    """One image of the job as it was seen."""

    uri: str | None = Field(None, description="Unset for an image that came inside the message.")
    version_id: str | None = None
    sha256: str = Field(description="Digest of the encoded bytes.")
    width: int = Field(ge=1, description="Pixels, EXIF orientation applied.")
    height: int = Field(ge=1)
    cache: CacheOutcome = Field(description="`miss`: encoded for this job; the others: not encoded again.")


class TokenUsage(Message):
    """Tokens, counted as vLLM and the OpenAI API do."""

    input_tokens: int = Field(ge=0, description="Prompt tokens, image tokens among them.")
    output_tokens: int = Field(ge=0)
    image_tokens: int = Field(0, ge=0)
    cached_tokens: int = Field(0, ge=0, description="Input tokens whose KV came from the prefix cache.")


class StageTimings(Message):
    """Milliseconds that the job spent in each stage, and altogether."""

    admit: float = Field(0.0, ge=0, description="Received and waiting for room.")
    fetch: float = Field(0.0, ge=0, description="Reading the images from S3.")
    prepare: float = Field(0.0, ge=0, description="Decoding and resizing the images.")
    queue: float = Field(0.0, ge=0, description="In the engine, before its first step.")
    encode: float = Field(0.0, ge=0, description="In the vision tower and projector.")
    time_to_first_token: float = Field(0.0, ge=0, description="From the engine's receipt to the first token.")
    generation: float = Field(0.0, ge=0, description="From the first token to the last.")
    total: float = Field(0.0, ge=0, description="From receipt to the finished text.")


class TokenLogprob(Message):
    """One token that was possible at one place."""

    token_id: int
    logprob: float = Field(description="Natural logarithm of its probability, before penalties and constraints.")
    rank: int = Field(ge=1, description="1 is the most probable.")
    text: str


TokenLogprobs = tuple[TokenLogprob, ...]
"""At one place: the token that stands there, then the most probable ones. Empty where none is known."""


class Output(Message):
    """One of several outputs of a job."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = None


class StoredResult(Message):
    """Where a whole result lies that was too large for its message."""

    uri: str = Field(description="`s3://bucket/key` of the result as it would have been sent.")
    sha256: str = Field(description="Digest of the object.")
    size: int = Field(ge=0, description="Bytes of the object.")


class Result(Message):
    """The answer to one job. Schema `result.v1`."""

    schema_name: ClassVar[str] = "result.v1"

    version: Literal[1] = 1
    job_id: str
    result_id: str = Field(description="Depends on job_id alone: the same when a job is answered again.")
    status: Literal["ok", "incomplete"] = Field(
        description="`incomplete`: cut by max_tokens, the context's length or a loop."
    )
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None = Field(None, description="Of each output token, where asked for.")
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = Field(
        None, description="Of each prompt token, where asked for."
    )
    outputs: tuple[Output, ...] | None = Field(
        None, description="With `n` above 1 all outputs; the fields beside repeat the first."
    )
    reused: AnswerReuse | None = Field(
        None, description="Not computed for this job: for an equal one before (`hit`), or at the same time (`joined`)."
    )
    usage: TokenUsage
    model: ModelUse
    inputs: tuple[InputUse, ...] = ()
    timings_ms: StageTimings = StageTimings()
    source: Source
    worker: str
    metadata: dict[str, Any] = Field(default_factory=dict, description="The job's own metadata.")
    stored: StoredResult | None = Field(
        None,
        description="The whole result is in S3, because it is too large for a message: `text`, `token_ids`, `outputs`, "
        "log-probabilities, `inputs` and `metadata` are empty here.",
    )

    def referring_to(self, stored: StoredResult) -> Result:
        """This result without whatever may be large, and with the place where all of it is."""
        large = {"text": "", "token_ids": (), "logprobs": None, "prompt_logprobs": None, "outputs": None}
        return self.model_copy(update={**large, "inputs": (), "metadata": {}, "stored": stored})


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
    reused: AnswerReuse | None = Field(None, description="As in the result; the engine's figures are then 0.")
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


class DeadLetter(Message):
    """Why a job failed for good: the envelope of a dead letter, whose value is the original message.

    Schema `dead-letter.v1`; in Kafka every field is a header, ``nanovllm_`` and its name.
    """

    schema_name: ClassVar[str] = "dead-letter.v1"

    version: Literal[1] = 1
    job_id: str | None = Field(None, description="Unset when it could not be read and not be derived.")
    code: str = Field(description="Stable name of the error.")
    error_class: DeadLetterClass
    stage: Stage = Field(description="Where it failed.")
    message: str = Field(description="What was wrong, for people; without URL queries.")
    retryable: bool = Field(False, description="The same message can succeed once the code's remedy was applied.")
    cause: str | None = Field(
        None, description="Name of the innermost error, and for the worker's own faults its place."
    )
    attempts: int = Field(1, ge=0, description="Attempts at the stage that failed, delayed retries among them.")
    source: Source
    worker: str
    received_at: datetime
    first_failed_at: datetime | None = Field(None, description="Of the first attempt, where there were several.")
    failed_at: datetime
