"""The TLS and login settings against Apache Kafka itself: SCRAM and PLAIN over TLS, and what must not get in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer
from certificates import write_certificate
from parts import KafkaNode

from nanovllm.client.producer import JobProducer
from nanovllm.demo.child_process import free_port
from nanovllm.errors import BrokersUnavailable, ConfigurationError, MissingTopic
from nanovllm.kafka.admin import create_topics
from nanovllm.kafka.client import consumer_kwargs
from nanovllm.kafka.topic_presence import require_topics
from nanovllm.messages.codec import decode_job
from nanovllm.settings.kafka import KafkaSettings

pytestmark = pytest.mark.kafka

PLAIN = "org.apache.kafka.common.security.plain.PlainLoginModule required"
SCRAM = "org.apache.kafka.common.security.scram.ScramLoginModule required;"


@dataclass(frozen=True)
class SecureBroker:
    bootstrap_servers: str
    ca: Path
    other_ca: Path

    def settings(self, **changes: object) -> KafkaSettings:
        values: dict[str, object] = {
            "bootstrap_servers": self.bootstrap_servers,
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_username": "worker",
            "sasl_password": "hunter2",
            "ssl_cafile": str(self.ca),
            "request_timeout_ms": 5_000,
        }
        return KafkaSettings.model_validate(values | changes)


@pytest.fixture
async def secure(tmp_path: Path) -> AsyncIterator[SecureBroker]:
    ca = write_certificate(tmp_path / "broker.crt", address="127.0.0.1")
    settings = {
        "listeners": "SASL_SSL://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}"
        f",PLAINTEXT://127.0.0.1:{free_port()}",
        "advertised.listeners": "SASL_SSL://127.0.0.1:{port}",
        "inter.broker.listener.name": "SASL_SSL",
        "sasl.mechanism.inter.broker.protocol": "SCRAM-SHA-512",
        "sasl.enabled.mechanisms": "SCRAM-SHA-256,SCRAM-SHA-512,PLAIN",
        "listener.name.sasl_ssl.plain.sasl.jaas.config": f'{PLAIN} user_worker="hunter2";',
        "listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config": SCRAM,
        "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": SCRAM.replace(
            ";", ' username="admin" password="admin";'
        ),
        "auto.create.topics.enable": "false",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(ca.with_suffix(".pem")),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(ca),
    }
    scram = {"admin": "admin", "worker": "hunter2"}
    async with KafkaNode(tmp_path, settings=settings, scram=scram, probe=False) as node:
        other = write_certificate(tmp_path / "other.crt", address="127.0.0.1")
        yield SecureBroker(node.bootstrap_servers, ca, other)


async def test_a_login_over_tls_lets_the_right_client_in_and_nobody_else(secure: SecureBroker) -> None:
    assert await create_topics(secure.settings(), ["jobs"], partitions=1) == ["jobs"]

    mechanisms = ["SCRAM-SHA-256", "SCRAM-SHA-512", "PLAIN"]
    for mechanism in mechanisms:
        async with JobProducer(secure.settings(sasl_mechanism=mechanism), topic="jobs") as producer:
            await producer.send("What is the total?", job_id=mechanism)

    consumer = AIOKafkaConsumer("jobs", **consumer_kwargs(secure.settings()) | {"auto_offset_reset": "earliest"})
    await consumer.start()
    try:
        seen: list[str | None] = []
        while len(seen) < len(mechanisms):
            for records in (await consumer.getmany(timeout_ms=500)).values():
                seen += [decode_job(record.value).job_id for record in records]
        assert seen == mechanisms
        await consumer.commit()
    finally:
        await consumer.stop()

    wrong: tuple[dict[str, object], ...] = (
        {"sasl_password": "wrong"},
        {"sasl_password": "wrong", "sasl_mechanism": "PLAIN"},
        {"sasl_username": "nobody"},
        {"ssl_cafile": str(secure.other_ca)},
        {"security_protocol": "SSL", "sasl_mechanism": None, "sasl_username": None, "sasl_password": None},
    )
    refusals = await asyncio.gather(
        *(create_topics(secure.settings(**changes), ["jobs"]) for changes in wrong), return_exceptions=True
    )
    assert [type(refusal) for refusal in refusals] == [BrokersUnavailable] * len(wrong)

    # What a start is told: these are for the user to change, and no wait mends them.
    told = await asyncio.gather(
        *(require_topics(secure.settings(**changes), ["jobs"]) for changes in wrong[:4]), return_exceptions=True
    )
    assert [type(refusal) for refusal in told] == [ConfigurationError] * 4
    assert all("refuse the login" in str(refusal) for refusal in told[:3])
    assert "ssl_cafile" in str(told[3])
    await require_topics(secure.settings(), ["jobs"])
    with pytest.raises(MissingTopic, match="topic absent"):
        await require_topics(secure.settings(), ["jobs", "absent"], patience_s=0.5)
