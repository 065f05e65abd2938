"""Delayed partitions: not read until their oldest record is due."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from aiokafka import ConsumerRecord, TopicPartition


class DelayedPartitions:
    """The oldest record of each delayed partition that must still wait.

    A record waits for its topic's delay since its timestamp, by this machine's clock, and never longer than the delay
    since it was first seen: a timestamp from the future delays nothing for ever.
    """

    def __init__(self, delays_s: Mapping[str, int], clock: Callable[[], float] = time.time) -> None:
        self._delays_s = delays_s
        self._clock = clock
        self._waiting: dict[TopicPartition, tuple[int, float]] = {}

    def is_over(self, tp: TopicPartition) -> bool:
        """Whether ``tp`` may be read."""
        return tp not in self._waiting or self._clock() >= self._waiting[tp][1]

    def split(
        self, tp: TopicPartition, records: Sequence[ConsumerRecord]
    ) -> tuple[Sequence[ConsumerRecord], int | None]:
        """Those of ``records`` that are due, and the offset of the first one that is not: read on from there later."""
        delay_s = self._delays_s.get(tp.topic)
        if delay_s is None:
            return records, None
        now = self._clock()
        for number, record in enumerate(records):
            offset, due = self._waiting.pop(tp, (-1, 0.0))
            if offset != record.offset:
                due = min(record.timestamp / 1000, now) + delay_s
            if due > now:
                self._waiting[tp] = (record.offset, due)
                return records[:number], record.offset
        return records, None
