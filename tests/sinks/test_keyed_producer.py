"""The keyed producer: the partition of a key is the one that Kafka's own clients choose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.partitioner import murmur2 as reference
from hypothesis import given
from hypothesis import strategies as st
from parts import create_topic

from nanovllm.kafka.keyed_producer import MAX_KNOWN_KEY_BYTES, KeyedProducer, _known_murmur2, murmur2


@given(st.binary(max_size=80))
def test_the_hash_of_a_key_is_the_one_of_kafkas_clients(key: bytes) -> None:
    assert murmur2(key) == reference(key)


@pytest.mark.parametrize(
    ("key", "java"),
    [(b"21", -973932308), (b"foobar", -790332482), (b"a-little-bit-long-string", -985981536), (b"abc", 479470107)],
)
def test_the_hash_is_the_one_that_kafkas_own_tests_name(key: bytes, java: int) -> None:
    assert murmur2(key) == java % 2**32


async def test_records_go_to_the_partitions_of_aiokafkas_producer(
    embedded_broker: str, unique: Callable[[str], str]
) -> None:
    topic = unique("keys")
    await create_topic(embedded_broker, topic, partitions=7)
    keys = [*(f"job-{number}".encode() for number in range(40)), b"k" * (MAX_KNOWN_KEY_BYTES + 1)]
    _known_murmur2.cache_clear()
    async with (
        KeyedProducer(bootstrap_servers=embedded_broker) as ours,
        AIOKafkaProducer(bootstrap_servers=embedded_broker) as theirs,
    ):
        for key in keys:
            mine, other = [await one.send_and_wait(topic, b"value", key=key) for one in (ours, theirs)]
            assert mine.partition == other.partition
        assert _known_murmur2.cache_info().currsize == 40  # a long key is not kept
        assert (await ours.send_and_wait(topic, b"value", partition=3, key=keys[0])).partition == 3
        assert (await ours.send_and_wait(topic, b"value")).partition in range(7)
