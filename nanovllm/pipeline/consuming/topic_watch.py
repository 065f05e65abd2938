"""Topic watch: topics that are deleted, made anew or given partitions while they are read.

Kafka's fetch and commit requests, in the versions of aiokafka 0.14, name a topic and not its id: a topic that was made
anew between two of them looks like the old one, and an offset of the old one would skip the first records of the new
one. So the ids are compared every ``INTERVAL_S``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from aiokafka import AIOKafkaConsumer

from nanovllm.kafka.topic_ids import listed_topics
from nanovllm.metrics import Metrics

logger = logging.getLogger(__name__)

INTERVAL_S = 3.0

Lags = Mapping[tuple[str, int], int]


class TopicWatch:
    """What the brokers list of ``read`` and ``written`` topics.

    ``missing`` are those that they do not list; a topic that is only written counts once it was there, for it may be
    made with its first record. ``made_anew`` are those of ``read`` that have another id than before, until the reader
    takes them out.
    """

    def __init__(self, read: Iterable[str], written: Iterable[str], metrics: Metrics) -> None:
        self._read = frozenset(read)
        self._topics = tuple(dict.fromkeys([*self._read, *written]))
        self._metrics = metrics
        self._ids: dict[str, bytes] = {}
        self._former_ids: set[bytes] = set()
        self._lags: Lags = {}
        self.missing: tuple[str, ...] = ()
        self.made_anew: set[str] = set()

    async def look(self, consumer: AIOKafkaConsumer, lags: Lags) -> None:
        """Ask a broker. ``lags``: records of each partition of this worker that are not finished now.

        Raises:
            KafkaError: no broker answers.
        """
        listed = await listed_topics(consumer._client, self._topics)
        missing = []
        for topic, now in listed.items():
            known = self._ids.get(topic)
            if now is None:
                if topic in self._read or known is not None:
                    missing.append(topic)
                    if topic not in self.missing:
                        self._note_loss(topic, "is missing; create it, or let `nanovllm topics create` make all")
                continue
            if topic in self.missing:
                logger.warning("topic %s is there again", topic)
            if now.topic_id in self._former_ids:  # of a broker that is behind the others
                continue
            if known is not None and now.topic_id != known:
                self._former_ids.add(known)
                if topic not in self.missing:
                    self._note_loss(topic, "was deleted and made anew")
                if topic in self._read:
                    self.made_anew.add(topic)
            self._ids[topic] = now.topic_id
            if topic in self._read and now.partitions != len(consumer.partitions_for_topic(topic) or ()):
                # The client would see it at the end of metadata_max_age_ms.
                consumer._client.force_metadata_update()
        self.missing = tuple(missing)
        self._lags = dict(lags)

    def _note_loss(self, topic: str, what: str) -> None:
        """Log what happened to ``topic``, and count what was waiting in it as overtaken."""
        lost = {where: lag for where, lag in self._lags.items() if where[0] == topic and lag}
        for where, lag in lost.items():
            self._metrics.overtaken.labels(*where).inc(lag)
        told = f"; about {sum(lost.values()):.0f} of its records were not finished here" if topic in self._read else ""
        logger.error("topic %s %s%s", topic, what, told)
