"""Topic requirements of the settings: which topics, how they must be set, and what a worker must be allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from nanovllm.errors import counted
from nanovllm.kafka.admin import COMPACTED, DAY_MS, TopicState
from nanovllm.pipeline.consuming.retry_topics import RetryTopics
from nanovllm.pipeline.routing.routes import load_routes
from nanovllm.settings.worker import Settings
from nanovllm.sinks.dead_letter_record import MIN_TOPIC_BYTES

# What a dead letter or a delayed retry adds to the job that it carries.
ENVELOPE_BYTES = 16 * 1024
HOUR_MS = 3600 * 1000


@dataclass(frozen=True)
class TopicNeed:
    """One topic that the settings name, and how it is created. ``operations`` are the worker's rights on it, if any."""

    name: str
    purpose: Literal["jobs", "retry", "results", "metrics", "dead letters", "reply", "in flight", "replayed", "events"]
    operations: tuple[str, ...]
    configs: Mapping[str, str] = field(default_factory=dict)
    delay_ms: int = 0


@dataclass(frozen=True)
class Finding:
    """Something about a topic. An ``error`` loses jobs or stops the worker; a ``warning`` may."""

    topic: str
    level: Literal["error", "warning"]
    what: str


def topic_needs(settings: Settings) -> list[TopicNeed]:
    """Every topic that a worker with ``settings`` reads or writes, and those of `dlq replay` and `bridge sqs`.

    Raises:
        InvalidRoutes: as `load_routes`, of the file that ``documents.routes`` names.
    """
    topics, retry_topics = settings.topics, RetryTopics.of(settings)
    described = ("DESCRIBE", "DESCRIBE_CONFIGS")
    writes = ("WRITE", *described)
    # A job that its topic takes fits, with what is added to it, what a worker may send.
    largest = settings.kafka.max_request_bytes
    carries_jobs = {"max.message.bytes": str(largest)}
    # A consumer unpacks a batch whole, whatever it becomes. With `uncompressed` the broker unpacks it piece by piece,
    # and max.message.bytes bounds what it has become.
    largest_job = {"max.message.bytes": str(max(1, largest - ENVELOPE_BYTES)), "compression.type": "uncompressed"}
    needs = [
        *(TopicNeed(name, "jobs", ("READ", *described), largest_job) for name in (topics.jobs, *topics.lanes)),
        TopicNeed(topics.results, "results", writes),
        TopicNeed(topics.metrics, "metrics", writes),
        TopicNeed(topics.dead_letters, "dead letters", writes, carries_jobs | {"retention.ms": str(28 * DAY_MS)}),
    ]
    for name, delay_s in retry_topics.delays_s.items():
        retention = {"retention.ms": str(2 * delay_s * 1000 + 7 * DAY_MS)}
        needs.append(TopicNeed(name, "retry", ("READ", *writes), carries_jobs | retention, delay_s * 1000))
    if settings.dead_letters.crash_limit:
        # Short segments: only closed ones are compacted, and a new owner reads back over the rest.
        compacted = COMPACTED | {"segment.ms": str(HOUR_MS), "min.cleanable.dirty.ratio": "0.1"}
        needs.append(TopicNeed(topics.in_flight, "in flight", ("READ", "WRITE", "DESCRIBE"), compacted))
    needs.append(TopicNeed(topics.replayed, "replayed", (), COMPACTED))
    reads = ("READ", *described) if topics.events in settings.consumed_topics else ()
    needs.append(TopicNeed(topics.events, "events", reads, largest_job))
    needs += [TopicNeed(name, "reply", writes) for name in topics.reply_to]
    if settings.documents.routes is not None:
        named = {need.name for need in needs}
        of_routes = load_routes(settings.documents.routes).topics
        needs += [TopicNeed(name, "results", writes) for name in of_routes if name not in named]
    return needs


def implied_acls(settings: Settings) -> list[tuple[str, str, str, str]]:
    """The rights of a worker, as (resource type, name, pattern, operation), and nothing more. Raises: `topic_needs`."""
    acls = [("TOPIC", need.name, "LITERAL", right) for need in topic_needs(settings) for right in need.operations]
    acls.append(("GROUP", settings.kafka.group_id, "LITERAL", "READ"))
    if settings.delivery == "exactly_once":
        acls += [
            ("TRANSACTIONAL_ID", f"{settings.kafka.group_id}/", "PREFIXED", right) for right in ("WRITE", "DESCRIBE")
        ]
    return acls


def findings(settings: Settings, states: Mapping[str, TopicState], *, workers: int | None = None) -> Iterator[Finding]:
    """What is wrong with the topics as they are (``states`` by name; one that is missing does not exist).

    ``workers``: how many shall work at once. Raises: as `topic_needs`.
    """
    jobs = [states[name] for name in settings.consumed_topics if name in states]
    jobs_retention_ms = max((state.retention_ms for state in jobs), default=0.0)
    largest_job = max((state.number("max.message.bytes") for state in jobs), default=0)
    for need in topic_needs(settings):
        state = states.get(need.name)
        if state is None and not need.operations:
            continue  # the first replay makes its own, a bridge says so; and a worker's user does not see them
        if state is None:
            # A topic of reply_to belongs to the service that waits there: `topics create` makes none.
            way = "the service that reads it makes it" if need.purpose == "reply" else "nanovllm topics create makes it"
            yield Finding(need.name, "error", f"does not exist; {way}")
            continue
        yield from _replication_findings(need, state)
        if settings.delivery == "exactly_once" and state.replication == 1 and "WRITE" in need.operations:
            # A partition without a leader is taken for a deleted one when a transaction ends (KAFKA-20734).
            yield Finding(need.name, "warning", "has one replica: a broker killed at a commit may show outputs twice")
        if need.purpose in ("jobs", "retry", "dead letters", "events") and "compact" in state.configs.get(
            "cleanup.policy", ""
        ):
            yield Finding(need.name, "error", "cleanup.policy compacts: of records with one key all but the last go")
        if need.purpose == "replayed" and state.configs.get("cleanup.policy", "compact") != "compact":
            yield Finding(need.name, "warning", "cleanup.policy is not `compact`: what it forgets is replayed again")
        if need.name in settings.consumed_topics:
            yield from _jobs_findings(settings, need, state, workers)
        elif need.purpose == "retry" and state.retention_ms < need.delay_ms + HOUR_MS:
            yield Finding(need.name, "error", f"retention.ms {state.retention_ms:.0f} removes jobs before they are due")
        elif need.purpose == "dead letters" and state.retention_ms < jobs_retention_ms:
            yield Finding(need.name, "warning", "retention.ms is below that of the jobs: they go before they are seen")
        if need.purpose in ("retry", "dead letters"):
            largest = min(state.number("max.message.bytes"), settings.kafka.max_request_bytes)
            small = too_small_for_dead_letters(need.name, largest) if need.purpose == "dead letters" else None
            if small is not None:
                yield small
            elif largest < largest_job:
                fate = "are cut" if need.purpose == "dead letters" else "are not retried later"
                yield Finding(
                    need.name,
                    "warning",
                    f"takes {largest} bytes (max.message.bytes, kafka.max_request_bytes), a job may have "
                    f"{largest_job}: large ones {fate}",
                )


def more_partitions(topic: str, partitions: int) -> str:
    """The command that adds partitions to ``topic``; none of ours changes a topic that is there."""
    return f"kafka-topics.sh --bootstrap-server … --alter --topic {topic} --partitions {partitions} adds them"


def too_small_for_dead_letters(topic: str, largest: int) -> Finding | None:
    """What is wrong with a topic of dead letters that takes records up to ``largest`` bytes; None where nothing is."""
    if largest >= MIN_TOPIC_BYTES:
        return None
    return Finding(
        topic,
        "error",
        f"takes {largest} bytes (the smaller of max.message.bytes and kafka.max_request_bytes), and a dead letter "
        f"without its job needs up to {MIN_TOPIC_BYTES}: one that is refused ends the worker; raise both to that or "
        "more",
    )


def _jobs_findings(settings: Settings, need: TopicNeed, state: TopicState, workers: int | None) -> Iterator[Finding]:
    if workers is not None and state.partitions < workers:
        few = f"has {counted(state.partitions, 'partition')}: of {workers} workers some stay idle"
        yield Finding(need.name, "error", f"{few}; {more_partitions(need.name, workers)}")
    if state.configs.get("compression.type", "producer") != "uncompressed":
        yield Finding(
            need.name,
            "warning",
            "compression.type is not `uncompressed`: a small batch may unpack to gigabytes in every worker",
        )
    ttl_s = settings.admission.ttl_s
    if ttl_s is not None and state.retention_ms < ttl_s * 1000:
        yield Finding(need.name, "warning", "retention.ms is below admission.ttl_s: jobs go before they expire")


def _replication_findings(need: TopicNeed, state: TopicState) -> Iterator[Finding]:
    in_sync = state.number("min.insync.replicas")
    if in_sync > state.replication:
        yield Finding(need.name, "error", f"min.insync.replicas {in_sync} is above its {state.replication} replicas")
    elif state.replication == 1:
        yield Finding(need.name, "warning", "has one replica: a lost broker loses it")
    elif in_sync == 1:
        yield Finding(need.name, "warning", "min.insync.replicas is 1: what is acknowledged may exist once")
