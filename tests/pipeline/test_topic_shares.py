"""Partition assignment: a share of each topic for every worker, and as few moves as that takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberMetadata
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.pipeline.consuming.topic_shares import TopicSharesAssignor
from tests.parts import eventually

Shares = Mapping[str, Mapping[str, list[int]]]


class Cluster:
    def __init__(self, partitions: Mapping[str, int]) -> None:
        self.partitions = partitions

    def partitions_for_topic(self, topic: str) -> set[int] | None:
        return set(range(self.partitions[topic])) if topic in self.partitions else None


def assign(topics: Mapping[str, int], members: Mapping[str, set[str]], before: Shares) -> Shares:
    metadata = {
        member: StickyPartitionAssignor._metadata(
            sorted(subscribed),
            [TopicPartition(topic, one) for topic, share in before.get(member, {}).items() for one in share],
            1,
        )
        for member, subscribed in members.items()
    }
    assigned = TopicSharesAssignor.assign(Cluster(topics), metadata)
    return {member: dict(share.assignment) for member, share in assigned.items()}


TOPICS = st.dictionaries(st.sampled_from(["events", "jobs", "retry-1", "retry-2"]), st.integers(1, 9), min_size=1)
MEMBERS = st.lists(st.sampled_from("abcdefg"), min_size=1, unique=True)


@given(TOPICS, MEMBERS, MEMBERS)
def test_shares_of_a_topic_differ_by_one_and_members_keep_what_they_may(
    topics: dict[str, int], first: list[str], then: list[str]
) -> None:
    before = assign(topics, {member: set(topics) for member in first}, {})
    after = assign(topics, {member: set(topics) for member in then}, before)
    for topic, count in topics.items():
        shares = [after[member].get(topic, []) for member in then]
        assert sorted(partition for share in shares for partition in share) == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        for member in set(first) & set(then):
            had, has = set(before[member].get(topic, [])), set(after[member].get(topic, []))
            assert len(had & has) == min(len(had), len(has))
    assert assign(topics, {member: set(topics) for member in then}, after) == after


@given(st.integers(1, 6), st.integers(2, 6))
def test_topics_of_one_partition_go_to_different_workers(num_topics: int, num_members: int) -> None:
    topics = {f"retry-{number}": 1 for number in range(num_topics)}
    shares = assign(topics, {f"w{number}": set(topics) for number in range(num_members)}, {})
    counts = [sum(map(len, share.values())) for share in shares.values()]
    assert max(counts) - min(counts) <= 1


def test_only_who_subscribes_to_a_topic_gets_partitions_of_it() -> None:
    shares = assign({"jobs": 4, "events": 4}, {"a": {"jobs"}, "b": {"jobs", "events"}, "c": {"missing"}}, {})
    assert shares["a"] == {"jobs": [0, 1]}
    assert shares["b"] == {"jobs": [2, 3], "events": [0, 1, 2, 3]}
    assert shares["c"] == {"missing": []}


def test_of_two_that_claim_a_partition_the_later_generation_has_it() -> None:
    claim = [TopicPartition("jobs", 0)]
    metadata: dict[str, ConsumerProtocolMemberMetadata] = {
        "a": StickyPartitionAssignor._metadata(["jobs"], claim, 1),
        "b": StickyPartitionAssignor._metadata(["jobs"], claim, 2),
    }
    assigned = TopicSharesAssignor.assign(Cluster({"jobs": 1}), metadata)
    assert dict(assigned["b"].assignment) == {"jobs": [0]}


@pytest.mark.kafka
async def test_a_second_worker_gets_half_of_each_topic_and_an_earlier_release_can_join(
    kafka_broker: str, unique: Callable[[str], str]
) -> None:
    topics, group = [unique("jobs"), unique("retry")], unique("group")
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka_broker)
    await admin.start()
    await admin.create_topics([NewTopic(topic, 4, 1) for topic in topics])
    await admin.close()

    async def join(*assignors: type) -> AIOKafkaConsumer:
        consumer = AIOKafkaConsumer(
            *topics,
            bootstrap_servers=kafka_broker,
            group_id=group,
            partition_assignment_strategy=assignors,
            heartbeat_interval_ms=200,
        )
        await consumer.start()
        consumers.append(consumer)
        return consumer

    def counts(consumer: AIOKafkaConsumer) -> list[int]:
        assigned = consumer.assignment()
        return [sum(partition.topic == topic for partition in assigned) for topic in topics]

    consumers: list[AIOKafkaConsumer] = []
    try:
        first = await join(TopicSharesAssignor, StickyPartitionAssignor)
        await eventually(lambda: counts(first) == [4, 4])
        second = await join(TopicSharesAssignor, StickyPartitionAssignor)
        await eventually(lambda: counts(first) == counts(second) == [2, 2])
        earlier = await join(StickyPartitionAssignor)
        await eventually(lambda: counts(earlier) != [0, 0])
        assert sum(map(sum, map(counts, consumers))) == 8
        await consumers.pop().stop()
        await eventually(lambda: counts(first) == counts(second) == [2, 2])
    finally:
        for consumer in consumers:
            await consumer.stop()
