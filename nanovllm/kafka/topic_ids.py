"""Topic ids: what tells a topic from one of the same name that was deleted (KIP-516)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO

from aiokafka import AIOKafkaClient
from aiokafka.errors import IncompatibleBrokerVersion, UnknownTopicOrPartitionError
from aiokafka.protocol.abstract import AbstractType
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)

UUID_BYTES = 16


class _Uuid(AbstractType[bytes]):
    @classmethod
    def encode(cls, value: bytes) -> bytes:
        return value

    @classmethod
    def decode(cls, data: BytesIO) -> bytes:
        return data.read(UUID_BYTES)


# aiokafka 0.14 ends at version 5 of the Metadata API; ids come with version 10, and 12 is in every broker since 3.1.
class _MetadataResponse(Response):
    API_KEY = 3
    API_VERSION = 12
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString("utf-8")),
                ("port", Int32),
                ("rack", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString("utf-8")),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("name", CompactString("utf-8")),
                ("topic_id", _Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _MetadataRequestStruct(RequestStruct):
    FLEXIBLE_VERSION = True
    API_KEY = 3
    API_VERSION = 12
    RESPONSE_TYPE = _MetadataResponse
    SCHEMA = Schema(
        ("topics", CompactArray(("topic_id", _Uuid), ("name", CompactString("utf-8")), ("tags", TaggedFields))),
        ("allow_auto_topic_creation", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class _MetadataRequest(Request[_MetadataRequestStruct]):
    API_KEY = 3

    def __init__(self, topics: Iterable[str]) -> None:
        self._topics: list[tuple[bytes, str, dict[int, bytes]]] = [(bytes(UUID_BYTES), topic, {}) for topic in topics]

    def build(self, request_struct_class: type[_MetadataRequestStruct]) -> _MetadataRequestStruct:
        return request_struct_class(self._topics, False, False, {})


@dataclass(frozen=True)
class ListedTopic:
    """A topic as a broker lists it."""

    topic_id: bytes
    partitions: int


async def listed_topics(client: AIOKafkaClient, names: Iterable[str]) -> dict[str, ListedTopic | None]:
    """What a broker says of ``names`` now: None of a topic that is not there, nothing of one that it may not tell of.

    A broker before Kafka 3.1 tells nothing. No topic is created.

    Raises:
        KafkaError: no broker answers.
    """
    try:
        answer = await client.send(client.get_random_node(), _MetadataRequest(names))
    except (IncompatibleBrokerVersion, NotImplementedError):
        return {}
    listed: dict[str, ListedTopic | None] = {}
    for code, name, topic_id, _, partitions, *_ in answer.topics:
        if code == 0:
            listed[name] = ListedTopic(topic_id, len(partitions))
        elif code == UnknownTopicOrPartitionError.errno:
            listed[name] = None
    return listed
