"""Limits of what topics take, which may be lowered while a worker runs."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping

from nanovllm.errors import BrokersUnavailable
from nanovllm.kafka.records import DEFAULT_MAX_RECORD_BYTES

logger = logging.getLogger(__name__)

MIN_BATCH_BYTES = 1 << 10


class TopicLimits:
    """The largest record of each topic, and the largest batch: a topic's ``max.message.bytes`` is meant for batches.

    ``read`` asks the brokers for the limits. Where they do not tell, batches halve at each refusal, down to single
    records.
    """

    def __init__(
        self,
        record_bytes: Mapping[str, int] | None = None,
        *,
        read: Callable[[], Awaitable[Mapping[str, int]]] | None = None,
    ) -> None:
        self._record_bytes = dict(record_bytes or {})
        self._read = read
        self.batch_bytes = min(self._record_bytes.values(), default=DEFAULT_MAX_RECORD_BYTES)
        self.in_use_bytes = self.batch_bytes  # of the producer that sends now

    def for_new_producer(self) -> int:
        """The largest batch, for a producer that is made now."""
        self.in_use_bytes = self.batch_bytes
        return self.batch_bytes

    def record_bytes(self, topic: str) -> int:
        """The largest record that ``topic`` takes."""
        return self._record_bytes.get(topic, DEFAULT_MAX_RECORD_BYTES)

    async def lower(self, batch_bytes: int) -> bool:
        """A broker refused a batch of a producer whose batches have up to ``batch_bytes``: the next one's are smaller.

        Returns whether they can be.
        """
        if self.batch_bytes < batch_bytes:
            return True  # another refusal of the same producer has lowered them
        if self._read is not None:
            try:
                self._record_bytes |= await self._read()
            except BrokersUnavailable as error:
                logger.warning("the limits of topics are not known: %s", error)
        if self.batch_bytes < batch_bytes:
            return True
        smallest = min(self._record_bytes.values(), default=DEFAULT_MAX_RECORD_BYTES)
        self.batch_bytes = max(MIN_BATCH_BYTES, min(batch_bytes // 2, smallest))
        return self.batch_bytes < batch_bytes
