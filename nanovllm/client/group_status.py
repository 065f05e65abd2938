"""The consumer group of the workers as the brokers know it: lag by partition, members, and rates of two readings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment
from aiokafka.errors import GroupCoordinatorNotAvailableError, KafkaError

from nanovllm.client.connection import connected_consumer
from nanovllm.errors import BrokersUnavailable
from nanovllm.kafka.admin import connected_admin
from nanovllm.settings.kafka import KafkaSettings

NEW_CLUSTER_S = 20.0


@dataclass(frozen=True)
class PartitionStatus:
    """One partition: the offset up to which it is finished, its end, and the client that has it.

    ``finished`` is that of the first record that there is where the group has committed nothing.
    """

    topic: str
    partition: int
    finished: int
    end: int
    client_id: str | None

    @property
    def lag(self) -> int:
        """Records that are not finished."""
        return max(0, self.end - self.finished)


@dataclass(frozen=True)
class MemberStatus:
    """One worker of the group."""

    client_id: str
    host: str
    partitions: int


@dataclass(frozen=True)
class GroupStatus:
    """The group at one moment; ``read_at`` is monotonic, in seconds."""

    group_id: str
    state: str
    partitions: tuple[PartitionStatus, ...]
    members: tuple[MemberStatus, ...]
    read_at: float

    @property
    def lag(self) -> int:
        """Records of all partitions that are not finished."""
        return sum(one.lag for one in self.partitions)


@dataclass(frozen=True)
class GroupRates:
    """Records a second that were written and finished between two readings."""

    written: float
    finished: float

    @classmethod
    def between(cls, before: GroupStatus, after: GroupStatus) -> GroupRates:
        """The rates from ``before`` to ``after``, of the partitions that both have."""
        earlier = {(one.topic, one.partition): one for one in before.partitions}
        pairs = [(earlier[key], one) for one in after.partitions if (key := (one.topic, one.partition)) in earlier]
        span_s = max(after.read_at - before.read_at, 1e-3)
        return cls(
            sum(max(0, now.end - then.end) for then, now in pairs) / span_s,
            sum(max(0, now.finished - then.finished) for then, now in pairs) / span_s,
        )

    def seconds_left(self, lag: int) -> float | None:
        """Seconds until ``lag`` records are finished at these rates; None: never."""
        if lag == 0:
            return 0.0
        gain = self.finished - self.written
        return lag / gain if gain > 0 else None


async def read_group(kafka: KafkaSettings, topics: Sequence[str]) -> GroupStatus:
    """Read the state of ``kafka.group_id`` for those of ``topics`` that exist.

    Raises:
        BrokersUnavailable: the brokers cannot be reached, or refuse.
    """
    group_id = kafka.group_id
    try:
        async with connected_admin(kafka) as admin, connected_consumer(kafka) as consumer:
            there = set(await admin.list_topics())
            described = await admin.describe_topics([name for name in topics if name in there] or [""])
            partitions = [
                TopicPartition(topic["topic"], one["partition"])
                for topic in described
                for one in topic["partitions"]
                if topic["topic"] in there
            ]
            read_at = time.monotonic()
            ends, beginnings = await consumer.end_offsets(partitions), await consumer.beginning_offsets(partitions)
            coordinator = await _coordinator_of(admin, group_id)
            committed = await admin.list_consumer_group_offsets(group_id, coordinator)
            (answer,) = await admin.describe_consumer_groups([group_id], coordinator)
    except KafkaError as error:
        raise BrokersUnavailable(f"group {group_id} cannot be read: {type(error).__name__}") from error
    (group,) = answer.to_object()["groups"]
    owners: dict[TopicPartition, str] = {}
    members = []
    for member in group["members"]:
        held = _partitions_of(member["member_assignment"])
        owners |= dict.fromkeys(held, member["client_id"])
        members.append(MemberStatus(member["client_id"], member["client_host"].removeprefix("/"), len(held)))
    return GroupStatus(
        group_id,
        group["state"],
        tuple(
            PartitionStatus(
                one.topic,
                one.partition,
                finished=committed[one].offset if one in committed and committed[one].offset >= 0 else beginnings[one],
                end=ends[one],
                client_id=owners.get(one),
            )
            for one in sorted(partitions)
        ),
        tuple(sorted(members, key=lambda member: member.client_id)),
        read_at,
    )


async def _coordinator_of(admin: AIOKafkaAdminClient, group_id: str) -> int:
    """The broker of the group. A cluster that never had a group makes its topic of offsets at the first question."""
    until = time.monotonic() + NEW_CLUSTER_S
    while True:
        try:
            coordinator: int = await admin.find_coordinator(group_id)
        except GroupCoordinatorNotAvailableError:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.25)
        else:
            return coordinator


def _partitions_of(assignment: bytes) -> list[TopicPartition]:
    if not assignment:
        return []  # the group is being divided anew
    decoded = ConsumerProtocolMemberAssignment.decode(assignment)
    return [TopicPartition(topic, one) for topic, partitions in decoded.assignment for one in partitions]
