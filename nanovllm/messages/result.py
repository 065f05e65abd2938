"""The result message: the answer to a job."""

from __future__ import annotations

import uuid
from hashlib import sha1
from typing import Any, ClassVar, Literal

from pydantic import Field

from nanovllm.messages.base import CacheOutcome, FinishReason, Message, Reused, Source

_RESULT_NAMESPACE = uuid.UUID("6d1f3d0e-5b0a-5e0c-9d7e-0f6b6e616e6f").bytes


def result_id_for(job_id: str) -> str:
    """The identity of a job's result: equal for every delivery and every worker, so that repeats can be dropped."""
    # As uuid.uuid5 makes it, without an object for it.
    digest = bytearray(sha1(_RESULT_NAMESPACE + job_id.encode(), usedforsecurity=False).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x50
    digest[8] = digest[8] & 0x3F | 0x80
    text = digest.hex()
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class ModelUse(Message):
    """What answered, exactly."""

    id: str = Field(description="Name of the checkpoint.")
    revision: str = Field(description="Revision of its files.")
    parameter_digest: str = Field(description="Digest of its parameters as loaded.")


class InputUse(Message):
    """One image of the job as it was seen."""

    uri: str | None = Field(None, description="Unset for an image that came inside the message.")
    version_id: str | None = None
    name: str | None = Field(None, description="What the job calls the image, such as its path at the sender.")
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
    constrained: bool | None = Field(
        None,
        description="Whether every token was confined to the job's `json_schema`, `regex`, `choice` or `grammar`; "
        "unset for a job without one.",
    )
    reused: Reused | None = Field(
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

    @property
    def input_names(self) -> tuple[str, ...]:
        """What the sender calls the images: a name, or else a URI; images that have neither are left out."""
        return tuple(name for image in self.inputs if (name := image.name or image.uri))

    def referring_to(self, stored: StoredResult) -> Result:
        """This result without whatever may be large, and with the place where all of it is."""
        large = {"text": "", "token_ids": (), "logprobs": None, "prompt_logprobs": None, "outputs": None}
        return self.model_copy(update={**large, "inputs": (), "metadata": {}, "stored": stored})
