"""Delayed retries: topics in which a job waits for longer than a partition could be held up.

Each tier is a topic with one delay, so its oldest record is always due first: a worker waits for that one by not
reading the partition until then. What must outlive the wait travels in headers beside the job's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from nanovllm.errors import NanoVLLMError
from nanovllm.kafka.records import Headers
from nanovllm.messages.base import Source
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.settings.base import MAX_TOPIC_CHARS
from nanovllm.settings.failures import retry_topic
from nanovllm.settings.worker import Settings
from nanovllm.sinks.kept_headers import MAX_REPLAYS, OWN_PREFIX, REPLAYS_HEADER
from nanovllm.value_object import value_object

MAX_ATTEMPTS = 1_000_000


@value_object
class Origin:
    """Where a job came from first, and what has been tried before this record.

    ``headers`` are the job's own, without what retries and replays added.
    """

    source: Source
    headers: Headers
    attempts: int = 0
    first_failed_at: datetime | None = None
    replays: int = 0

    def retry_headers(self, attempts: int, failed_at: datetime, error: NanoVLLMError) -> Headers:
        """The headers of the record that waits for its next attempt."""
        source = self.source
        carried = {
            "source_topic": source.topic,
            "source_partition": source.partition,
            "source_offset": source.offset,
            "source_timestamp_ms": source.timestamp_ms,
            "attempts": attempts,
            "first_failed_at": failed_at.isoformat(),
            "code": error.code,
            "replays": self.replays or None,
        }
        ours = ((f"{OWN_PREFIX}{name}", str(value).encode()) for name, value in carried.items() if value is not None)
        return (*self.headers, *ours)


class RetryTopics:
    """The retry topics of each topic of jobs, in the order in which a job goes through them; none without delays.

    ``topics``: the priorities of topics of jobs and events.
    """

    def __init__(self, topics: Mapping[str, int], delays_s: Sequence[int]) -> None:
        self.delays_s: dict[str, int] = {}
        """Seconds that a record waits, by retry topic."""
        self.lanes: dict[str, int] = {}
        """The priority of every topic that jobs are read from: a lane is a topic of jobs with its retry topics."""
        self._next: dict[str, str] = {}
        for topic, priority in topics.items():
            retry_topics = {retry_topic(topic, delay_s): delay_s for delay_s in delays_s}
            self.delays_s |= retry_topics
            self.lanes |= dict.fromkeys([topic, *retry_topics], priority)
            self._next |= dict(zip([topic, *retry_topics], retry_topics, strict=False))

    @classmethod
    def of(cls, settings: Settings) -> RetryTopics:
        """Those that ``settings`` ask for."""
        return cls(settings.consumed_topics, settings.retries.delays_s)

    def with_retries(self, topic: str) -> list[str]:
        """``topic`` and the retry topics behind it."""
        found = [topic]
        while (following := self._next.get(found[-1])) is not None:
            found.append(following)
        return found

    def topic_after(self, topic: str, *, before: datetime | None) -> str | None:
        """Where a job from ``topic`` waits next; None after the last tier, or when it would be due after ``before``."""
        following = self._next.get(topic)
        if following is None or before is None:
            return following
        left_s = (before - datetime.now(UTC)).total_seconds()
        return following if left_s > self.delays_s[following] else None

    def origin_of(self, record: ConsumedRecord) -> Origin:
        """Where the job of ``record`` came from. Only records of retry topics are believed what their headers say.

        The number of replays is read from every topic: it decides nothing, and is shown to operators.
        """
        others = tuple(header for header in record.headers if not header[0].startswith(OWN_PREFIX))
        here = Source(
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            timestamp_ms=record.timestamp_ms,
        )
        replays = _replays(record.headers)
        if record.topic not in self.delays_s:
            return Origin(here, others, replays=replays)
        own = (header for header in record.headers if header[0].startswith(OWN_PREFIX))
        carried = {name.removeprefix(OWN_PREFIX): value.decode(errors="replace") for name, value in own}
        if any(len(value) > MAX_TOPIC_CHARS for value in carried.values()):
            return Origin(here, others, replays=replays)
        try:
            attempts = int(carried["attempts"])
            if not 0 <= attempts <= MAX_ATTEMPTS:
                raise ValueError(attempts)
            return Origin(
                Source(
                    topic=carried["source_topic"],
                    partition=int(carried["source_partition"]),
                    offset=int(carried["source_offset"]),
                    timestamp_ms=int(carried["source_timestamp_ms"]) if "source_timestamp_ms" in carried else None,
                ),
                others,
                attempts,
                datetime.fromisoformat(carried["first_failed_at"]).astimezone(UTC),
                replays,
            )
        except (KeyError, ValueError, OverflowError):
            # Not a record of a worker: a job like any other.
            return Origin(here, others, replays=replays)


def _replays(headers: Headers) -> int:
    """How often the record was replayed, as a header says that anybody can send; 0 for what is no small number."""
    text = next((value for name, value in headers if name == REPLAYS_HEADER), b"")
    return int(text) if len(text) <= len(str(MAX_REPLAYS)) and text.isdigit() else 0
