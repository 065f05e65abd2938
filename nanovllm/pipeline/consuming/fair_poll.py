"""Fair polling: lanes take turns, partitions of a lane too, and what can wait comes apart from the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from nanovllm.pipeline.admission.lanes import LaneTurns

Batches = dict[TopicPartition, list[ConsumerRecord]]


class FairPoll:
    """Takes records from a consumer, so that no partition keeps others waiting.

    ``lanes``: the lane of each topic; a lower one goes first. ``put_off``: partitions that have polls of their own.
    """

    def __init__(self, lanes: Mapping[str, int]) -> None:
        self._lanes = lanes
        self._turns = LaneTurns()
        self._had_their_turn: set[TopicPartition] = set()
        self.put_off: set[TopicPartition] = set()

    def rooms(
        self, free: Mapping[TopicPartition, int], max_records: int | Mapping[int, int], *, put_off: bool
    ) -> dict[TopicPartition, int]:
        """How many records each of the partitions may give now that are put off, or that are not.

        ``free``: how many they may give by themselves; ``max_records``: altogether, or those of each lane.
        """
        rooms = {}
        for tp, room in free.items():
            bound = max_records if isinstance(max_records, int) else max_records.get(self._lanes[tp.topic], 0)
            if (tp in self.put_off) is put_off and min(bound, room) > 0:
                rooms[tp] = min(bound, room)
        return rooms

    async def take(self, consumer: AIOKafkaConsumer, rooms: Mapping[TopicPartition, int], timeout_ms: int) -> Batches:
        """Records of the lane whose turn it is, or of the next one that has any, within the ``rooms``.

        Raises:
            KafkaError: as ``getmany`` does.
        """
        lanes: defaultdict[int, dict[TopicPartition, int]] = defaultdict(dict)
        for tp, room in rooms.items():
            lanes[self._lanes[tp.topic]][tp] = room
        if len(lanes) > 1:
            first = self._turns.next(lanes)
            for lane in sorted(lanes, key=lambda lane: (lane != first, lane)):
                if batches := await self._take_from(consumer, lanes[lane], 0):
                    self._turns.serve(lane, lanes)
                    return batches
        return await self._take_from(consumer, rooms, timeout_ms)

    async def _take_from(
        self, consumer: AIOKafkaConsumer, rooms: Mapping[TopicPartition, int], timeout_ms: int
    ) -> Batches:
        """The partitions in their turns.

        aiokafka hands out what it has of one partition before it looks at the next: a partition full of small records
        would keep the others waiting until it is empty.
        """
        share = max(1, min(rooms.values()) // len(rooms))
        batches: Batches
        if others := [tp for tp in rooms if tp not in self._had_their_turn]:
            batches = await consumer.getmany(*others, timeout_ms=0, max_records=share)
            if batches:
                self._had_their_turn |= batches.keys()
                return batches
        batches = await consumer.getmany(*rooms, timeout_ms=timeout_ms, max_records=share)
        self._had_their_turn = set(batches)
        return batches
