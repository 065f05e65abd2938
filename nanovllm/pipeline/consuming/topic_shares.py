"""Partition assignment of the group: every worker gets its share of each topic, and keeps what it had.

aiokafka's sticky assignor balances the partitions of all topics together: with retry topics one worker may get all of
the jobs, and the next one, started because of the lag, none of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from aiokafka.cluster import ClusterMetadata
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata


class TopicSharesAssignor(StickyPartitionAssignor):
    """Assignor whose shares of a topic differ by one partition at most; what is over goes to who has fewest in all.

    Members tell what they had in the format of the sticky assignor (KIP-54), which a consumer names behind this one:
    a group that also has members of an earlier release uses that one until the last of them is gone.
    """

    name = "nanovllm-topic-shares"

    @classmethod
    def assign(
        cls, cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """The partitions of every member: each partition of a topic has one of the members that subscribe to it."""
        known = {member: cls.parse_member_metadata(metadata) for member, metadata in members.items()}
        had: dict[str, dict[int, str]] = defaultdict(dict)
        for member, metadata in sorted(known.items(), key=lambda item: item[1].generation):
            for topic, partition in metadata.partitions:
                had[topic][partition] = member  # of two that claim it, the one of the later generation
        shares: dict[str, dict[str, list[int]]] = {member: {} for member in members}
        totals: Counter[str] = Counter()
        for topic in sorted({topic for metadata in known.values() for topic in metadata.subscription}):
            readers = sorted(member for member, metadata in known.items() if topic in metadata.subscription)
            partitions = sorted(cluster.partitions_for_topic(topic) or ())
            for member, share in share_out(partitions, readers, had[topic], totals).items():
                shares[member][topic] = share
                totals[member] += len(share)
        return {
            member: ConsumerProtocolMemberAssignment(cls.version, sorted(topics.items()), b"")
            for member, topics in shares.items()
        }


def share_out(
    partitions: Iterable[int], readers: Iterable[str], had: Mapping[int, str], totals: Mapping[str, int]
) -> dict[str, list[int]]:
    """The partitions of a topic among its readers, equally but for one; a reader keeps as many as it may.

    ``had`` names who had a partition before, ``totals`` how many partitions of other topics a reader has already.
    """
    left, kept = list(partitions), {reader: list[int]() for reader in readers}
    for partition in left:
        if (owner := had.get(partition)) in kept:
            kept[owner].append(partition)
    least, over = divmod(len(left), len(kept))
    by_need = sorted(kept, key=lambda reader: (totals.get(reader, 0), -len(kept[reader]), reader))
    shares = {}
    for place, reader in enumerate(by_need):
        shares[reader] = kept[reader][: least + (place < over)]
        left = [partition for partition in left if partition not in shares[reader]]
    for place, reader in enumerate(by_need):
        missing = least + (place < over) - len(shares[reader])
        shares[reader] = sorted(shares[reader] + left[:missing])
        left = left[missing:]
    return shares
