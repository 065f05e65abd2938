"""Start offset of a partition, and what retention removed before it."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Container, Iterable
from itertools import pairwise
from typing import Literal

from aiokafka import AIOKafkaConsumer, OffsetAndMetadata, TopicPartition

from nanovllm.metrics import Metrics

logger = logging.getLogger(__name__)

GONE = "the offset that the group had there is gone, what the log still has is answered again"


class StartOffsets:
    """Resolves start offsets. The consumer's own reset would skip records without telling.

    ``policy`` is where a group begins that is new to a topic. A partition that is added later has only jobs that came
    since, and is read from its beginning; so is every partition of ``read_in_full``, topics that only workers write.
    Everything raises KafkaError when the brokers refuse.
    """

    def __init__(
        self, policy: Literal["earliest", "latest"], metrics: Metrics, *, read_in_full: Container[str] = ()
    ) -> None:
        self._policy = policy
        self._metrics = metrics
        self._read_in_full = read_in_full
        self._read_before: set[str] = set()
        self._partitions: dict[str, int] = {}
        self._had_offset: set[TopicPartition] = set()

    async def look(self, consumer: AIOKafkaConsumer, topics: Iterable[str]) -> None:
        """Note which of ``topics`` the group has read and how many partitions each has.

        To be called before the consumer joins its group. Afterwards the offsets of other members that are new as well
        would look like those of a group that has been here before.
        """
        for topic in topics:
            numbers = consumer.partitions_for_topic(topic) or ()
            self._partitions[topic] = len(numbers)
            if await committed_offsets(consumer, [TopicPartition(topic, number) for number in numbers]):
                self._read_before.add(topic)

    def recount(self, consumer: AIOKafkaConsumer) -> None:
        """At each assignment: a topic that was deleted has no partitions; made anew, all of them count as added."""
        for topic, partitions in self._partitions.items():
            self._partitions[topic] = min(partitions, len(consumer.partitions_for_topic(topic) or ()))

    async def committed(self, consumer: AIOKafkaConsumer, tps: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        """The committed offsets of ``tps``, which are assigned to ``consumer``; those left out begin at the beginning.

        Where a partition begins at its end, that offset is committed first: a worker that ends before it has read
        anything must not skip the jobs that came meanwhile. With a transactional producer this is safe before it is
        started, for no record was consumed from a partition without a committed offset.
        """
        offsets = await committed_offsets(consumer, tps)
        begins: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)
        at_end = []
        for tp in sorted(set(tps) - offsets.keys()):
            where, why = self._begin(tp)
            begins[tp.topic, where, why].append(tp.partition)
            if where == "end":
                at_end.append(tp)
        if at_end:
            ends: dict[TopicPartition, int] = await consumer.end_offsets(at_end)
            await consumer.commit({tp: OffsetAndMetadata(offset, "") for tp, offset in ends.items()})
            offsets |= ends
        self._had_offset.update(offsets)
        for (topic, where, why), numbers in begins.items():
            level = logging.WARNING if why is GONE else logging.INFO
            logger.log(level, "%s: partitions %s are read from their %s: %s", topic, _ranges(numbers), where, why)
        return offsets

    def _begin(self, tp: TopicPartition) -> tuple[str, str]:
        if tp in self._had_offset:
            return "beginning", GONE
        if self._policy == "earliest":
            return "beginning", "the group has committed no offset there"
        if tp.topic in self._read_in_full:
            return "beginning", "what waits for another attempt is never skipped"
        if tp.topic in self._read_before:
            return "beginning", "they are new, the group has read others of the topic"
        if tp.partition >= self._partitions.get(tp.topic, 0):
            return "beginning", "they are new since this worker joined the group"
        return "end", "the group is new to the topic, and kafka.auto_offset_reset is latest"

    async def near(self, consumer: AIOKafkaConsumer, tp: TopicPartition, wanted: int | None) -> int:
        """Where reading begins when it should begin at ``wanted`` (None: the beginning)."""
        beginning: int = (await consumer.beginning_offsets([tp]))[tp]
        if wanted is None:
            return beginning
        if wanted < beginning:
            logger.error(
                "%s-%d: retention removed the offsets %d to %d before they were read: jobs may be lost; "
                "raise the topic's retention, or add workers",
                *(tp.topic, tp.partition, wanted, beginning - 1),
            )
            self._metrics.overtaken.labels(tp.topic, tp.partition).inc(beginning - wanted)
        return max(wanted, beginning)

    async def anew(self, consumer: AIOKafkaConsumer, tp: TopicPartition, wanted: int) -> int:
        """Where reading begins when the log ends before ``wanted``, which was the next offset: at its beginning."""
        logger.warning(
            "%s-%d: the log ends before offset %d, so the topic was made anew or cut: it is read from its beginning",
            *(tp.topic, tp.partition, wanted),
        )
        return await self.near(consumer, tp, None)


async def committed_offsets(consumer: AIOKafkaConsumer, tps: Collection[TopicPartition]) -> dict[TopicPartition, int]:
    """The group's committed offsets, as far as there are any; the partitions need not be assigned."""
    # One request; consumer.committed() sends one for each partition.
    found = await consumer._coordinator.fetch_committed_offsets(list(tps))
    return {tp: committed.offset for tp, committed in found.items()}


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    breaks = [at for at, (one, following) in enumerate(pairwise(numbers), 1) if following != one + 1]
    runs = [numbers[start:end] for start, end in pairwise([0, *breaks, len(numbers)])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
