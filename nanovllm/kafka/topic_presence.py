"""Topic presence: which topics the brokers list, asked before anything is built on them."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Collection

from aiokafka import AIOKafkaClient
from aiokafka import errors as kafka_errors
from aiokafka.conn import create_conn
from aiokafka.errors import KafkaError

from nanovllm.errors import BrokersUnavailable, ConfigurationError, MissingTopic, NanoVLLMError
from nanovllm.kafka.client import client_kwargs
from nanovllm.kafka.paced_metadata import pace_metadata
from nanovllm.kafka.topic_ids import listed_topics
from nanovllm.settings.kafka import KafkaSettings

PATIENCE_S = 5.0
"""Brokers that create topics by themselves, and followers that hear of a new one late, take about a second."""

PAUSE_S = 0.25

_REFUSED_LOGIN = (
    kafka_errors.AuthenticationFailedError,
    kafka_errors.AuthenticationMethodNotSupported,
    kafka_errors.IllegalSaslStateError,
    kafka_errors.SaslAuthenticationFailed,
    kafka_errors.UnsupportedSaslMechanismError,
)


async def require_topics(
    kafka: KafkaSettings, names: Collection[str], *, patience_s: float = PATIENCE_S, may_be_created: bool = True
) -> None:
    """Return when the brokers list all of ``names``.

    With ``may_be_created`` brokers that create topics by themselves create them; else a missing one stays missing
    (before Kafka 3.1, where the broker cannot be asked without, it is created all the same).

    Raises:
        MissingTopic: some are not listed after ``patience_s``.
        ConfigurationError: the brokers refuse the login, their TLS does not fit, or this user may not see a topic.
        BrokersUnavailable: no broker answers.
    """
    client = AIOKafkaClient(**client_kwargs(kafka))
    pace_metadata(client)
    try:
        try:
            await client.bootstrap()
        except KafkaError as error:
            raise await _why_unreachable(kafka, client.hosts) from error
        until = time.monotonic() + patience_s
        if not may_be_created:
            await _wait_until_listed(client, kafka, names, until)
        client.set_topics(names)
        is_updated = False
        while not is_updated or (missing := _unlisted(client, names)):
            is_updated = await client.force_metadata_update()
            if hidden := sorted(client.cluster.unauthorized_topics.intersection(names)):
                raise ConfigurationError(
                    f"this user may not see {_listed(hidden, 'topic')}: `nanovllm topics acls` lists the rights"
                )
            if time.monotonic() > until:
                break
        if not is_updated:
            raise _no_answer(kafka)
        if missing := _unlisted(client, names):
            raise _missing(kafka, missing)
    finally:
        await client.close()


async def _wait_until_listed(
    client: AIOKafkaClient, kafka: KafkaSettings, names: Collection[str], until: float
) -> None:
    while True:
        try:
            listed = await listed_topics(client, names)
        except KafkaError:
            # A metadata update logs which addresses do not answer: brokers name them themselves.
            if not await client.force_metadata_update() or time.monotonic() > until:
                raise _no_answer(kafka) from None
            continue
        missing = [name for name, topic in listed.items() if topic is None]
        if not missing:
            return
        if time.monotonic() > until:
            raise _missing(kafka, missing)
        await asyncio.sleep(PAUSE_S)


def _no_answer(kafka: KafkaSettings) -> BrokersUnavailable:
    return BrokersUnavailable(f"no broker of those behind {kafka.bootstrap_servers} answers")


def _missing(kafka: KafkaSettings, names: Collection[str]) -> MissingTopic:
    return MissingTopic(f"the brokers at {kafka.bootstrap_servers} do not list {_listed(names, 'topic')}")


def _unlisted(client: AIOKafkaClient, names: Collection[str]) -> list[str]:
    return [name for name in names if client.cluster.partitions_for_topic(name) is None]


def _listed(names: Collection[str], noun: str) -> str:
    return f"{noun if len(names) == 1 else noun + 's'} {', '.join(names)}"


async def _why_unreachable(kafka: KafkaSettings, hosts: Collection[tuple[str, int, object]]) -> NanoVLLMError:
    """The error of the bootstrap servers. aiokafka's ``bootstrap`` tells one kind for all reasons."""
    options = client_kwargs(kafka)
    del options["bootstrap_servers"], options["metadata_max_age_ms"]
    for host, port, _ in hosts:
        try:
            (await create_conn(host, port, **options)).close()
        except _REFUSED_LOGIN as error:
            return ConfigurationError(
                f"the brokers at {kafka.bootstrap_servers} refuse the login ({type(error).__name__}): check "
                "kafka.sasl_mechanism, sasl_username and sasl_password"
            )
        except ssl.SSLError as error:
            reason = getattr(error, "verify_message", None) or error.reason or type(error).__name__
            return ConfigurationError(
                f"no TLS with {host}:{port}: {reason}; check kafka.security_protocol, ssl_cafile and ssl_check_hostname"
            )
        except (TimeoutError, OSError, KafkaError):
            continue
    return BrokersUnavailable(f"no broker answers at {kafka.bootstrap_servers}")
