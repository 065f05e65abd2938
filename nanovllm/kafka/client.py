"""Arguments of aiokafka's clients, from the settings: brokers, TLS, SASL, timeouts."""

from __future__ import annotations

import ssl
from typing import Any

from nanovllm.errors import ConfigurationError
from nanovllm.kafka.oauth_tokens import MskIamToken, TokenFile
from nanovllm.settings.kafka import KafkaSettings

JOIN_MARGIN_MS = 5_000
BATCH_BYTES = 256 * 1024


def ssl_context(kafka: KafkaSettings) -> ssl.SSLContext | None:
    """The TLS context for aiokafka, or None without TLS.

    Raises:
        ConfigurationError: a file that is missing or holds no usable certificate or key.
    """
    if not kafka.uses_tls:
        return None
    try:
        context = ssl.create_default_context(cafile=str(kafka.ssl_cafile) if kafka.ssl_cafile else None)
        context.check_hostname = kafka.ssl_check_hostname
        if kafka.ssl_certfile:
            # A callable in place of None: OpenSSL would otherwise ask on the terminal and block the worker.
            password = kafka.ssl_key_password.get_secret_value() if kafka.ssl_key_password else ""
            context.load_cert_chain(kafka.ssl_certfile, kafka.ssl_keyfile, password=lambda: password)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or getattr(error, "reason", None) or type(error).__name__
        raise ConfigurationError(f"kafka.ssl_cafile, ssl_certfile or ssl_keyfile cannot be used: {reason}") from error
    return context


def client_kwargs(kafka: KafkaSettings) -> dict[str, Any]:
    """Arguments that every aiokafka client takes: brokers, TLS and login."""
    kwargs: dict[str, Any] = {
        "bootstrap_servers": kafka.bootstrap_servers,
        "client_id": kafka.client_id,
        "metadata_max_age_ms": kafka.metadata_max_age_ms,
        "request_timeout_ms": kafka.request_timeout_ms,
        "security_protocol": kafka.security_protocol,
        "ssl_context": ssl_context(kafka),
    }
    login: dict[str, Any] = {}
    if kafka.sasl_oauth_token_file:
        login = {"sasl_oauth_token_provider": TokenFile(kafka.sasl_oauth_token_file)}
    elif kafka.sasl_oauth_aws_region:
        login = {"sasl_oauth_token_provider": MskIamToken.in_region(kafka.sasl_oauth_aws_region)}
    elif kafka.sasl_mechanism and kafka.sasl_password:
        password = kafka.sasl_password.get_secret_value()
        login = {"sasl_plain_username": kafka.sasl_username, "sasl_plain_password": password}
    return kwargs | login | ({"sasl_mechanism": kafka.sasl_mechanism} if login else {})


def consumer_kwargs(kafka: KafkaSettings, *, drain_timeout_s: float = 0.0) -> dict[str, Any]:
    """Arguments of the worker's AIOKafkaConsumer; offsets are never committed behind its back."""
    rebalance_timeout_ms = kafka.rebalance_timeout_for(drain_timeout_s)
    return client_kwargs(kafka) | {
        "group_id": kafka.group_id,
        "group_instance_id": kafka.group_instance_id,
        # The answer to JoinGroup comes when the slowest member has drained.
        "request_timeout_ms": max(kafka.request_timeout_ms, rebalance_timeout_ms + JOIN_MARGIN_MS),
        # `none`: the client would skip lost records without telling. The source resolves and counts them itself.
        "auto_offset_reset": "none",
        "enable_auto_commit": False,
        "isolation_level": "read_committed",
        "session_timeout_ms": kafka.session_timeout_ms,
        "heartbeat_interval_ms": kafka.heartbeat_interval_ms,
        "rebalance_timeout_ms": rebalance_timeout_ms,
        "max_poll_interval_ms": kafka.max_poll_interval_ms,
        "fetch_max_bytes": kafka.fetch_max_bytes,
        "max_partition_fetch_bytes": kafka.max_partition_fetch_bytes,
    }


def producer_kwargs(kafka: KafkaSettings) -> dict[str, Any]:
    """Arguments of an AIOKafkaProducer whose sends are acknowledged by all replicas, once and in order."""
    return client_kwargs(kafka) | {
        "acks": "all",
        "enable_idempotence": True,
        "max_request_size": kafka.max_request_bytes,
        "compression_type": kafka.compression_type,
        "linger_ms": kafka.linger_ms,
        # One batch of a partition is under way at a time: at aiokafka's 16 KiB that is some 25 dead letters.
        "max_batch_size": BATCH_BYTES,
    }


def transactional_kwargs(kafka: KafkaSettings, topic: str, partition: int) -> dict[str, Any]:
    """Arguments of the AIOKafkaProducer for what comes of one input partition, with `delivery: exactly_once`."""
    return producer_kwargs(kafka) | {
        # No topic has a slash in its name: two partitions never share an id.
        "transactional_id": f"{kafka.group_id}/{topic}/{partition}",
        "transaction_timeout_ms": kafka.transaction_timeout_ms,
        # A transaction is a batch already; and its brokers are often busy with the one before, for milliseconds.
        "linger_ms": 0,
        "retry_backoff_ms": 20,
    }
