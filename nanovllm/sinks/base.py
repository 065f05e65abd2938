"""The interface of sinks, as the stages of a job see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nanovllm.errors import NanoVLLMError
from nanovllm.kafka.records import OutgoingRecord


class Sink(Protocol):
    """Publishes records, and returns when they are there to stay. `KafkaSink` and `OutcomeSink` are sinks."""

    part: str
    """What is reported as a fault while it takes nothing."""

    async def max_record_bytes(self, topic: str, wanted_bytes: int) -> int:
        """Size of the largest record that ``topic`` takes; for a record of ``wanted_bytes``."""

    async def check(self, records: Sequence[OutgoingRecord]) -> None:
        """Raise MessageTooLarge where a topic would refuse one of ``records``."""

    async def publish_each(self, records: Sequence[OutgoingRecord]) -> list[NanoVLLMError | None]:
        """Publish ``records``; returns the error of each, None where it is there to stay."""
