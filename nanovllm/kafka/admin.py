"""Topic administration: creation, state, and how large a message a topic takes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import InvalidReplicationFactorError, KafkaError, TopicAlreadyExistsError, for_code

from nanovllm.errors import BrokersUnavailable, TooFewBrokers
from nanovllm.kafka.client import client_kwargs
from nanovllm.kafka.errors import refusals_of
from nanovllm.settings.kafka import KafkaSettings

DAY_MS = 24 * 3600 * 1000
COMPACTED = {"cleanup.policy": "compact"}
DEFAULTS = {"max.message.bytes": 1_048_588, "retention.ms": 7 * DAY_MS, "min.insync.replicas": 1}


@dataclass(frozen=True)
class TopicState:
    """One topic as it is."""

    partitions: int
    replication: int
    configs: Mapping[str, str]

    def number(self, name: str) -> int:
        """The value of a setting; Kafka's own default where the broker does not tell."""
        return int(self.configs.get(name, DEFAULTS[name]))

    @property
    def retention_ms(self) -> float:
        """How long records stay; infinity for ever."""
        retention = self.number("retention.ms")
        return float("inf") if retention < 0 else retention


async def create_topics(
    kafka: KafkaSettings,
    names: Sequence[str],
    *,
    partitions: int = 4,
    replication: int = 1,
    configs: Mapping[str, Mapping[str, str]] | None = None,
) -> list[str]:
    """Create those of ``names`` that are not there, and return them; those that are there stay as they are.

    ``configs`` are topic settings by name of the topic.

    Raises:
        BrokersUnavailable: the brokers cannot be reached, or refuse.
        TooFewBrokers: so many copies cannot be made.
    """
    created, settings = [], configs or {}
    async with connected_admin(kafka) as admin:
        topics = [NewTopic(name, partitions, replication, topic_configs=dict(settings.get(name, {}))) for name in names]
        response = await admin.create_topics(topics)
        for name, code, *reason in response.topic_errors:
            error = for_code(code)
            if code == 0:
                created.append(name)
            elif error is not TopicAlreadyExistsError:
                why = reason[0] if reason and reason[0] else error.__name__
                kind = TooFewBrokers if error is InvalidReplicationFactorError else BrokersUnavailable
                raise kind(f"topic {name} cannot be created: {why}")
    return created


async def topic_states(kafka: KafkaSettings, names: Sequence[str]) -> dict[str, TopicState]:
    """Those of ``names`` that exist, as they are.

    Raises:
        BrokersUnavailable: the brokers cannot be reached, or refuse.
    """
    async with connected_admin(kafka) as admin:
        there = set(await admin.list_topics())
        known = [name for name in names if name in there]
        described = await admin.describe_topics(known) if known else []  # an empty list would ask for every topic
        configs: dict[str, dict[str, str]] = {}
        for topic in described:
            resource = ConfigResource(ConfigResourceType.TOPIC, topic["topic"])
            for response in await admin.describe_configs([resource]):
                for code, _, _, name, entries in response.resources:
                    if code == 0:
                        configs[name] = {entry[0]: str(entry[1]) for entry in entries}
    return {
        topic["topic"]: TopicState(
            len(topic["partitions"]),
            min(len(partition["replicas"]) for partition in topic["partitions"]),
            configs.get(topic["topic"], {}),
        )
        for topic in described
        if topic["partitions"]
    }


async def message_limits(kafka: KafkaSettings, names: Sequence[str]) -> dict[str, int]:
    """The largest message in bytes that each of ``names`` and the producer's own limit allow.

    A broker that does not tell (or a user who may not ask) leaves the producer's own limit.

    Raises:
        BrokersUnavailable: the brokers cannot be reached.
    """
    limits = dict.fromkeys(names, kafka.max_request_bytes)
    async with connected_admin(kafka) as admin:
        resources = [ConfigResource(ConfigResourceType.TOPIC, name, {"max.message.bytes": None}) for name in names]
        try:
            responses = await admin.describe_configs(resources)
        except (KafkaError, ValueError):
            return limits
    for response in responses:
        for code, _, _, name, entries in response.resources:
            for entry in entries if code == 0 else ():
                if entry[0] == "max.message.bytes" and str(entry[1]).isdigit():
                    limits[name] = min(kafka.max_request_bytes, int(entry[1]))
    return limits


@asynccontextmanager
async def connected_admin(kafka: KafkaSettings) -> AsyncIterator[AIOKafkaAdminClient]:
    """A started admin client. Raises BrokersUnavailable: the brokers cannot be reached, or refuse."""
    admin = AIOKafkaAdminClient(**client_kwargs(kafka))
    try:
        with refusals_of(kafka.bootstrap_servers):
            await admin.start()
            if admin._client.cluster.controller is None:
                # aiokafka takes a refused OAUTHBEARER token for a login, and the broker then tells it nothing.
                raise BrokersUnavailable(f"the brokers at {kafka.bootstrap_servers} refuse the login")
            yield admin
    finally:
        await admin.close()
