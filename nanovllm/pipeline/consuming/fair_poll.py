"""Fair polling: lanes take turns, partitions of a lane too, and what can wait comes apart from the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aiokafka import ConsumerRecord, TopicPartition

from nanovllm.kafka.prefetched import Prefetched
from nanovllm.kafka.raw_records import PARSE_ERRORS
from nanovllm.pipeline.admission.lanes import LaneTurns

Batches = dict[TopicPartition, list[ConsumerRecord]]
RoomOf = Callable[[TopicPartition], int]


class FairPoll:
    """Takes records that are at hand, so that no partition keeps others waiting.

    ``lanes``: the lane of each topic; a lower one goes first. ``put_off``: partitions that have polls of their own.
    ``unparsed``: those whose next record the client cannot parse.
    """

    def __init__(self, lanes: Mapping[str, int]) -> None:
        self._lanes = lanes
        self._all_lanes = sorted(set(lanes.values()))
        self._turns = LaneTurns()
        self.put_off: set[TopicPartition] = set()
        self.unparsed: set[TopicPartition] = set()

    async def take(self, prefetched: Prefetched, room_of: RoomOf, max_records: int | Mapping[int, int]) -> Batches:
        """Records of the lane whose turn it is, or of the next one that has any.

        Args:
            room_of: how many records a partition may give now.
            max_records: how many may be taken, altogether or of each lane.

        Raises:
            KafkaError: what the broker said of one of the partitions.
        """
        bounds = {
            lane: max_records if isinstance(max_records, int) else max_records.get(lane, 0) for lane in self._all_lanes
        }
        waiting = [lane for lane in self._all_lanes if bounds[lane] and self._has_any(prefetched, lane, room_of)]
        if not waiting:
            return {}
        first = self._turns.next(waiting)
        for lane in sorted(waiting, key=lambda lane: (lane != first, lane)):
            if batches := await self._take_from(prefetched, lane, room_of, bounds[lane]):
                self._turns.serve(lane, waiting)
                return batches
        return {}

    def _has_any(self, prefetched: Prefetched, lane: int, room_of: RoomOf) -> bool:
        return any(self._lanes.get(tp.topic) == lane and room_of(tp) > 0 for tp in prefetched.partitions)

    async def _take_from(self, prefetched: Prefetched, lane: int, room_of: RoomOf, left: int) -> Batches:
        batches: Batches = {}
        share = max(1, left // len(prefetched.partitions))
        for tp in list(prefetched.partitions):
            if self._lanes.get(tp.topic) != lane or (room := room_of(tp)) <= 0:
                continue
            if prefetched.is_error(tp):
                if batches:
                    continue  # it comes first the next time
                await prefetched.raise_error(tp)
                continue
            try:
                records = prefetched.take(tp, min(share, room, left))
            except PARSE_ERRORS:
                self.unparsed.add(tp)
                continue
            if records:
                batches[tp] = records
                left -= len(records)
            if left <= 0:
                break
        return batches
