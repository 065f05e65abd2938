"""Fair polling of what a consumer has prefetched: turns, lanes, errors, and its cost with many partitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from nanovllm.kafka.prefetched import Prefetched
from nanovllm.pipeline.consuming.fair_poll import FairPoll


def partition(number: int, topic: str = "jobs") -> TopicPartition:
    return TopicPartition(topic, number)


class AtHand(Prefetched):
    """Records of each partition, or what reading it raises: the consumer's own dictionary, without a consumer."""

    def __init__(self, held: Mapping[TopicPartition, list[int] | Exception]) -> None:
        self.held = dict(held)

    @property
    def partitions(self) -> dict[TopicPartition, list[int] | Exception]:
        return self.held

    def is_error(self, tp: TopicPartition) -> bool:
        return isinstance(self.held[tp], KafkaError)

    async def raise_error(self, tp: TopicPartition) -> None:
        error = self.held.pop(tp)
        assert isinstance(error, KafkaError)
        raise error

    def take(self, tp: TopicPartition, max_records: int) -> list[ConsumerRecord]:
        offsets = self.held.pop(tp)
        if isinstance(offsets, Exception):
            raise offsets
        if offsets[max_records:]:
            self.held[tp] = offsets[max_records:]
        return [ConsumerRecord(*tp, offset, 0, 0, None, b"", 0, 0, 0, ()) for offset in offsets[:max_records]]


async def taken(poll: FairPoll, at_hand: AtHand, room: int) -> dict[int, list[int]]:
    batches = await poll.take(at_hand, lambda _: 1_000, room)
    return {tp.partition: [record.offset for record in records] for tp, records in batches.items()}


async def test_a_partition_full_of_records_keeps_no_other_waiting() -> None:
    at_hand = AtHand({partition(0): list(range(1_000)), partition(1): [7], partition(2): [8, 9]})
    poll = FairPoll({"jobs": 0})
    assert await taken(poll, at_hand, 2) == {0: [0], 1: [7]}
    assert await taken(poll, at_hand, 2) == {2: [8], 0: [1]}
    assert await taken(poll, at_hand, 8) == {2: [9], 0: [2, 3, 4, 5]}


async def test_the_cost_of_a_record_does_not_grow_with_the_partitions() -> None:
    at_hand = AtHand({partition(number): list(range(4)) for number in range(1_000)})
    poll = FairPoll({"jobs": 0})
    asked: Counter[TopicPartition] = Counter()

    def room_of(tp: TopicPartition) -> int:
        asked[tp] += 1
        return 10

    records = 0
    for _ in range(500):
        records += sum(map(len, (await poll.take(at_hand, room_of, 8)).values()))
    assert records == 4_000
    assert asked.total() <= 2 * records


async def test_an_error_is_raised_alone_and_loses_no_records() -> None:
    at_hand = AtHand({partition(0): [1], partition(1): KafkaError("refused"), partition(2): [2]})
    poll = FairPoll({"jobs": 0})
    assert await taken(poll, at_hand, 8) == {0: [1], 2: [2]}
    with pytest.raises(KafkaError, match="refused"):
        await taken(poll, at_hand, 8)
    assert await taken(poll, at_hand, 8) == {}


async def test_what_the_client_cannot_parse_is_one_partitions_matter() -> None:
    at_hand = AtHand(
        {partition(0): [1], partition(1): UnicodeDecodeError("utf-8", b"\xe4", 0, 1, ""), partition(2): [2]}
    )
    poll = FairPoll({"jobs": 0})
    assert await taken(poll, at_hand, 8) == {0: [1], 2: [2]}
    assert poll.unparsed == {partition(1)}


async def test_partitions_without_room_and_of_other_lanes_are_left_alone() -> None:
    at_hand = AtHand({partition(0, "slow"): [1], partition(1): [2], partition(2): [3]})
    poll = FairPoll({"jobs": 0, "slow": 5})
    batches = await poll.take(at_hand, lambda tp: tp.partition != 2, {0: 4, 5: 4})
    assert list(batches) == [partition(1)]
    assert list(at_hand.held) == [partition(0, "slow"), partition(2)]
    assert list(await poll.take(at_hand, lambda tp: tp.partition != 2, {0: 4, 5: 4})) == [partition(0, "slow")]
