"""Logging in with tokens: at Apache Kafka with short-lived ones, and for MSK with the signer itself."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import SaslAuthenticationFailed
from parts import KafkaNode

from nanovllm.errors import BrokersUnavailable, ConfigurationError
from nanovllm.kafka import oauth_tokens as login_tokens
from nanovllm.kafka.admin import create_topics
from nanovllm.kafka.client import client_kwargs, consumer_kwargs, producer_kwargs
from nanovllm.kafka.oauth_tokens import MskIamToken, TokenFile
from nanovllm.settings.kafka import KafkaSettings

TOKEN_S = 6  # renewed every second: a pause of some seconds is no failure


def unsigned_token() -> str:
    """What a broker that checks no signature takes."""
    now = time.time()
    parts = ({"alg": "none"}, {"sub": "worker", "iat": now, "exp": now + TOKEN_S})
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts) + "."


@pytest.mark.kafka
async def test_connections_outlive_their_tokens_on_apache_kafka(tmp_path: Path) -> None:
    login = "org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required"
    broker = {
        "listeners": "SASL_PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": "SASL_PLAINTEXT://127.0.0.1:{port}",
        "listener.security.protocol.map": "SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "SASL_PLAINTEXT",
        "sasl.mechanism.inter.broker.protocol": "OAUTHBEARER",
        "sasl.enabled.mechanisms": "OAUTHBEARER",
        "listener.name.sasl_plaintext.oauthbearer.sasl.jaas.config": f'{login} unsecuredLoginStringClaim_sub="admin";',
        # The broker cuts a connection whose token has expired.
        "connections.max.reauth.ms": str(TOKEN_S * 1_000),
    }
    file = tmp_path / "token"
    settings = KafkaSettings(
        security_protocol="SASL_PLAINTEXT",
        sasl_mechanism="OAUTHBEARER",
        sasl_oauth_token_file=file,
        request_timeout_ms=5_000,
    )
    async with KafkaNode(tmp_path, settings=broker, probe=False) as node:
        kafka = settings.model_copy(update={"bootstrap_servers": node.bootstrap_servers})
        with pytest.raises(BrokersUnavailable):
            await create_topics(kafka, ["jobs"])

        async def renew() -> None:
            while True:
                file.write_text(unsigned_token())
                await asyncio.sleep(1)

        renewing = asyncio.create_task(renew())
        await asyncio.sleep(0.1)
        producer = consumer = None
        try:
            await create_topics(kafka, ["jobs"], partitions=1)
            producer = AIOKafkaProducer(**producer_kwargs(kafka))
            await producer.start()
            consumer = AIOKafkaConsumer("jobs", **consumer_kwargs(kafka) | {"auto_offset_reset": "earliest"})
            await consumer.start()
            seen: list[bytes] = []
            sent: list[bytes] = []
            end = time.monotonic() + 2 * TOKEN_S
            while time.monotonic() < end:
                sent.append(str(len(sent)).encode())
                await producer.send_and_wait("jobs", sent[-1])
                for records in (await consumer.getmany(timeout_ms=900)).values():
                    seen += [record.value for record in records]
                await asyncio.sleep(0.1)
            async with asyncio.timeout(60):
                while len(seen) < len(sent):
                    for records in (await consumer.getmany(timeout_ms=500)).values():
                        seen += [record.value for record in records]
            assert seen == sent
        finally:
            renewing.cancel()
            for client in (producer, consumer):
                if client is not None:
                    await client.stop()
        file.write_text("no.token.")
        with pytest.raises(BrokersUnavailable):
            await create_topics(kafka, ["more"])


async def test_a_token_for_msk_is_signed_with_the_workers_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aws_msk_iam_sasl_signer")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    kafka = KafkaSettings(
        security_protocol="SASL_SSL", sasl_mechanism="OAUTHBEARER", sasl_oauth_aws_region="eu-central-1"
    )
    provider = client_kwargs(kafka)["sasl_oauth_token_provider"]
    token = await provider.token()
    signed = urlsplit(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode())
    query = parse_qs(signed.query)
    assert signed.hostname == "kafka.eu-central-1.amazonaws.com"
    assert query["Action"] == ["kafka-cluster:Connect"]
    assert query["X-Amz-Credential"][0].startswith("AKIDEXAMPLE/")
    assert "hunter2" not in signed.geturl()
    assert await provider.token() == token


async def test_a_token_is_signed_once_for_many_and_anew_before_it_ends() -> None:
    now, signed = 0.0, 0

    def sign() -> tuple[str, float]:
        nonlocal signed
        signed += 1
        return f"token-{signed}", (now + 900) * 1000

    provider = MskIamToken(sign, clock=lambda: now)
    assert set(await asyncio.gather(*(provider.token() for _ in range(5)))) == {"token-1"}
    now = 839.0
    assert await provider.token() == "token-1"
    now = 841.0
    assert await provider.token() == "token-2"


async def test_what_goes_wrong_with_a_token_is_a_refused_login_and_tells_nothing(tmp_path: Path) -> None:
    def sign() -> tuple[str, float]:
        raise RuntimeError("AWS_SECRET_ACCESS_KEY=hunter2")

    with pytest.raises(SaslAuthenticationFailed) as caught:
        await MskIamToken(sign).token()
    assert "hunter2" not in str(caught.value)
    empty = tmp_path / "token"
    empty.write_text("\n")
    for file in (empty, tmp_path / "missing"):
        with pytest.raises(SaslAuthenticationFailed, match="sasl_oauth_token_file"):
            await TokenFile(file).token()


@pytest.mark.parametrize(
    "wrong",
    [
        {"sasl_mechanism": "OAUTHBEARER"},
        {"sasl_mechanism": "OAUTHBEARER", "sasl_oauth_token_file": "t", "sasl_oauth_aws_region": "r"},
        {"sasl_mechanism": "OAUTHBEARER", "sasl_oauth_token_file": "t", "sasl_password": "p"},
        {"sasl_mechanism": "PLAIN", "sasl_username": "u", "sasl_password": "p", "sasl_oauth_token_file": "t"},
    ],
)
def test_settings_that_contradict_one_another_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"sasl_|OAUTHBEARER"):
        KafkaSettings.model_validate({"security_protocol": "SASL_SSL", **wrong})


async def test_without_the_extra_the_signer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login_tokens.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"\.\[msk\]"):
        MskIamToken.in_region("eu-central-1")
