from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from parts import create_topic, eventually, evict_members

from nanovllm.demo.broker import EmbeddedBroker, answers_metadata
from nanovllm.errors import SystemicError


async def test_records_survive_a_clean_stop_on_the_same_directory(tmp_path):
    broker = EmbeddedBroker(tmp_path)
    await broker.start()
    try:
        await create_topic(broker.bootstrap_servers, "letters", partitions=1)
        async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap_servers) as producer:
            for letter in b"abc":
                await producer.send_and_wait("letters", bytes([letter]))
        broker.stop()
        assert not await answers_metadata(broker.bootstrap_servers)
        await broker.start()
        consumer = AIOKafkaConsumer(
            "letters",
            bootstrap_servers=broker.bootstrap_servers,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
        )
        async with consumer:
            assert [(await consumer.getone()).value for _ in range(3)] == [b"a", b"b", b"c"]
    finally:
        broker.stop()


async def test_a_broker_that_cannot_bind_its_port_says_so():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        broker = EmbeddedBroker(port=taken.getsockname()[1])
        try:
            with pytest.raises(SystemicError, match="embedded broker"):
                await broker.start(timeout_s=20)
        finally:
            broker.stop()


async def test_stop_ends_the_process_and_removes_its_temporary_directory():
    broker = EmbeddedBroker()
    try:
        await broker.start()
        pid, directory = broker._process.pid, broker._directory
        assert pid is not None
        assert directory.exists()
    finally:
        broker.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not directory.exists()


DEAD_MEMBER = """
import asyncio, sys
from aiokafka import AIOKafkaConsumer
async def main():
    servers, topic, group = sys.argv[1:]
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=servers, group_id=group, enable_auto_commit=False)
    await consumer.start()
    while not consumer.assignment():
        await asyncio.sleep(0.02)
    print("joined", flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


async def test_a_dead_members_partitions_are_free_once_it_is_evicted(embedded_broker, unique):
    topic, group = unique("topic"), unique("group")
    await create_topic(embedded_broker, topic, partitions=2)
    member = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DEAD_MEMBER, embedded_broker, topic, group, stdout=asyncio.subprocess.PIPE
    )
    assert member.stdout is not None
    assert await member.stdout.readline() == b"joined\n"
    member.send_signal(signal.SIGKILL)
    await member.wait()

    assert len(await evict_members(embedded_broker, group)) == 1
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=embedded_broker, group_id=group, enable_auto_commit=False, session_timeout_ms=6_000
    )
    async with consumer:
        await eventually(lambda: len(consumer.assignment()) == 2)
        assert consumer.assignment() == {TopicPartition(topic, 0), TopicPartition(topic, 1)}


async def test_evicting_from_a_group_that_nobody_joined_evicts_nobody(embedded_broker, unique):
    assert await evict_members(embedded_broker, unique("group")) == []
