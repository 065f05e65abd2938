"""Base model of the outgoing messages."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "loop", "abort"]
Reused = Literal["hit", "joined"]
CacheOutcome = Literal["hit", "joined", "miss", "prefix"]


class Message(BaseModel):
    """A part of an outgoing message. Readers ignore unknown fields: today's must take the messages of tomorrow."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Source(Message):
    """The record that a job came in."""

    topic: str
    partition: int = Field(ge=0)
    offset: int = Field(ge=0)
    timestamp_ms: int | None = Field(None, description="The record's timestamp, milliseconds since 1970.")
