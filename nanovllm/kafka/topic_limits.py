"""Limits of what topics take, which may be changed while a worker runs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from nanovllm.errors import BrokersUnavailable
from nanovllm.kafka.records import DEFAULT_MAX_RECORD_BYTES

logger = logging.getLogger(__name__)

MIN_BATCH_BYTES = 1 << 10
READ_INTERVAL_S = 10.0


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
        self._reading = asyncio.Lock()
        self._read_at = float("-inf")
        self.batch_bytes = self._smallest
        self.in_use_bytes = self.batch_bytes  # of the producer that sends now

    def for_new_producer(self) -> int:
        """The largest batch, for a producer that is made now."""
        self.in_use_bytes = self.batch_bytes
        return self.batch_bytes

    def record_bytes(self, topic: str) -> int:
        """The largest record that ``topic`` takes."""
        return self._record_bytes.get(topic, DEFAULT_MAX_RECORD_BYTES)

    async def room_for(self, topic: str, record_bytes: int) -> int:
        """As ``record_bytes``; a limit below so many is read anew first, if that was not done in ``READ_INTERVAL_S``.

        It may have been raised since: what is refused by a limit of earlier would be given up for nothing.
        """
        if record_bytes > self.record_bytes(topic):
            async with self._reading:
                if time.monotonic() - self._read_at >= READ_INTERVAL_S:
                    await self.read_anew()
        return self.record_bytes(topic)

    async def read_anew(self) -> None:
        """Ask the brokers for the limits; where they do not answer, those of earlier stay."""
        if self._read is None:
            return
        smallest = self._smallest
        try:
            self._record_bytes |= await self._read()
        except BrokersUnavailable as error:
            logger.warning("the limits of topics are not known: %s", error)
        self._read_at = time.monotonic()
        if self.batch_bytes == smallest:
            self.batch_bytes = self._smallest

    @property
    def _smallest(self) -> int:
        return min(self._record_bytes.values(), default=DEFAULT_MAX_RECORD_BYTES)

    async def lower(self, batch_bytes: int) -> bool:
        """A broker refused a batch of a producer whose batches have up to ``batch_bytes``: the next one's are smaller.

        Returns whether they can be.
        """
        if self.batch_bytes < batch_bytes:
            return True  # another refusal of the same producer has lowered them
        await self.read_anew()
        if self.batch_bytes < batch_bytes:
            return True
        self.batch_bytes = max(MIN_BATCH_BYTES, min(batch_bytes // 2, self._smallest))
        return self.batch_bytes < batch_bytes
