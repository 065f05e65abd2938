"""The outcome sink: results and dead letters go to two functions in place of Kafka."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from nanovllm.errors import NanoVLLMError, SystemicError
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.settings.topics import TopicSettings
from nanovllm.sinks.dead_letter_record import read_dead_letter


class OutcomeSink:
    """Hands each encoded result to ``on_result``, and each dead letter with its record's value to ``on_dead_letter``.

    Metrics go nowhere.

    Both raise SystemicError where nothing can be taken now.
    """

    part = "output"

    def __init__(
        self,
        topics: TopicSettings,
        on_result: Callable[[bytes], object],
        on_dead_letter: Callable[[DeadLetter, bytes], object],
    ) -> None:
        self._topics = topics
        self._on_result = on_result
        self._on_dead_letter = on_dead_letter

    async def max_record_bytes(self, topic: str, wanted_bytes: int) -> int:
        """No limit."""
        return sys.maxsize

    async def check(self, records: Sequence[OutgoingRecord]) -> None:
        """Nothing is too large."""

    async def publish_each(self, records: Sequence[OutgoingRecord]) -> list[NanoVLLMError | None]:
        """Hand over ``records``; returns the error of each, None where it was taken."""
        return [self._hand_over(record) for record in records]

    def _hand_over(self, record: OutgoingRecord) -> SystemicError | None:
        try:
            if record.topic == self._topics.dead_letters:
                self._on_dead_letter(read_dead_letter(record.headers, record.value), record.value or b"")
            elif record.topic != self._topics.metrics:
                self._on_result(record.value or b"")
        except SystemicError as error:
            return error
        return None
