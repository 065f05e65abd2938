"""The dead letter: a record that has no answer, and why."""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar, Literal

from pydantic import Field

from nanovllm.messages.base import Message, Source

DeadLetterClass = Literal["invalid", "permanent", "retries_exhausted", "expired"]
Stage = Literal["receive", "admit", "fetch", "prepare", "infer", "publish"]


class DeadLetter(Message):
    """Why a job failed for good: the envelope of a dead letter, whose value is the original message.

    Schema `dead-letter.v1`; in Kafka every field is a header, ``nanovllm_`` and its name, but ``inputs``.
    """

    schema_name: ClassVar[str] = "dead-letter.v1"

    version: Literal[1] = 1
    job_id: str | None = Field(None, description="Unset when it could not be read and not be derived.")
    inputs: tuple[str, ...] = Field(
        (), description="Names or URIs of the job's images, as readers find them in the original message; no header."
    )
    code: str = Field(description="Stable name of the error.")
    error_class: DeadLetterClass
    stage: Stage = Field(description="Where it failed.")
    message: str = Field(description="What was wrong, for people; without URL queries.")
    retryable: bool = Field(False, description="The same message can succeed once the code's remedy was applied.")
    cause: str | None = Field(
        None, description="Name of the innermost error, and for the worker's own faults its place."
    )
    attempts: int = Field(1, ge=0, description="Attempts at the stage that failed, delayed retries among them.")
    replays: int | None = Field(
        None, ge=1, description="How often `dlq replay` had sent the job again before it failed; unset: never."
    )
    source: Source
    queue: str | None = Field(
        None,
        description="SQS queue that `bridge sqs` took the message from; its `source` is the topic that it was meant "
        "for, and a number made of `message_id` in place of an offset.",
    )
    message_id: str | None = Field(None, description="The message's own id in the queue.")
    worker: str
    received_at: datetime
    first_failed_at: datetime | None = Field(None, description="Of the first attempt, where there were several.")
    failed_at: datetime
