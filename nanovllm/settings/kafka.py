"""Settings of the connection to the brokers and of the consumer group."""

from __future__ import annotations

from ipaddress import IPv6Address
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from nanovllm.settings.base import Bytes, Millis, SettingsModel

# What a worker needs after its drain and before it joins again: the last commit, which may wait for brokers.
AFTER_DRAIN_MS = 15_000


def _is_ipv6(host: str) -> bool:
    try:
        IPv6Address(host)
    except ValueError:
        return False
    return True


class KafkaSettings(SettingsModel):
    """Where the brokers are and how to speak to them."""

    bootstrap_servers: str = Field("localhost:9092", min_length=1, description="Brokers, `host:port,host:port`.")
    group_id: str = Field("nanovllm", min_length=1, description="Consumer group of the workers.")
    group_instance_id: str | None = Field(
        None,
        min_length=1,
        description="Static membership, a name a worker: a restart within the session timeout moves no partition.",
    )
    client_id: str = Field("nanovllm", min_length=1, description="Name shown in the brokers' logs and quotas.")
    auto_offset_reset: Literal["earliest", "latest"] = Field(
        "earliest",
        description="Where a group starts that is new to a topic: `earliest` takes the jobs that are waiting. "
        "Partitions that are added later, and retry topics, are read from their beginning.",
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="`SSL` and `SASL_SSL` encrypt; the `SASL_` ones log in."
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = Field(
        None, description="How to log in; `OAUTHBEARER` takes its tokens from one of the `sasl_oauth_` settings."
    )
    sasl_username: str | None = Field(None, description="User name of PLAIN and SCRAM.")
    sasl_password: SecretStr | None = Field(None, description="Password of PLAIN and SCRAM.")
    sasl_oauth_token_file: Path | None = Field(
        None, description="File that holds an OAUTHBEARER token, read anew for each connection."
    )
    sasl_oauth_aws_region: str | None = Field(
        None, min_length=1, description="Region of an Amazon MSK cluster with IAM login (OAUTHBEARER; extra `msk`)."
    )
    ssl_cafile: Path | None = Field(None, description="PEM file of the brokers' CA; unset: the system's CAs.")
    ssl_certfile: Path | None = Field(None, description="PEM file of the client's certificate (mutual TLS).")
    ssl_keyfile: Path | None = Field(
        None, description="PEM file of the client's key, where the certificate's lacks it."
    )
    ssl_key_password: SecretStr | None = Field(None, description="Password of an encrypted client key.")
    ssl_check_hostname: bool = Field(True, description="Check that the broker's certificate names its host.")
    metadata_max_age_ms: Millis = Field(
        30_000, description="Partitions that were added, and leaders that moved unnoticed, are known after this long."
    )
    request_timeout_ms: Millis = Field(40_000, description="Longest wait for one answer of a broker.")
    session_timeout_ms: Millis = Field(10_000, description="A worker silent for this long loses its partitions.")
    heartbeat_interval_ms: Millis = Field(
        3_000, description="Time between heartbeats; a third of the session timeout. Deprecated."
    )
    rebalance_timeout_ms: Millis | None = Field(
        None,
        description="Longest wait of a rebalance for a draining worker; unset: the drain's time and 15 s. Deprecated.",
    )
    max_poll_interval_ms: Millis = Field(
        300_000, description="A worker that polls no more for this long leaves the group."
    )
    transaction_timeout_ms: Millis = Field(
        30_000,
        description="With `exactly_once`: a transaction of a worker that died holds readers up at most this long.",
    )
    fetch_max_bytes: Bytes = Field(50 * 2**20, description="Most bytes of one fetch from a broker. Deprecated.")
    max_partition_fetch_bytes: Bytes = Field(
        2**20, description="Most bytes of one fetch from one partition. Deprecated."
    )
    max_request_bytes: Bytes = Field(2**20, description="Largest message that is sent; at most the topics' own limit.")
    compression_type: Literal["gzip", "lz4", "snappy", "zstd"] | None = Field(
        None, description="Compression of what is sent; every kind is read."
    )
    linger_ms: int = Field(5, ge=0, description="Wait for more messages before a batch is sent.")

    @field_validator("bootstrap_servers")
    @classmethod
    def _check_ports(cls, servers: str) -> str:
        for server in filter(None, map(str.strip, servers.split(","))):
            # As aiokafka reads them: an IPv6 address with a port is in brackets, and 9092 is the port without one.
            if _is_ipv6(server):
                continue
            has_port = ":" in server.rpartition("]")[2]
            host, _, port = server.rpartition(":") if has_port else (server, ":", "9092")
            if not host or "/" in host or not (port.isascii() and port.isdigit()):
                raise ValueError("a broker is host:port, with a number for a port and without a scheme")
            if int(port) > 65_535:
                raise ValueError("a port is above 65535")
        return servers

    @model_validator(mode="after")
    def _check_security(self) -> KafkaSettings:
        uses_sasl = self.security_protocol.startswith("SASL_")
        uses_tokens = self.sasl_mechanism == "OAUTHBEARER"
        if uses_tokens != (bool(self.sasl_oauth_token_file) or bool(self.sasl_oauth_aws_region)):
            raise ValueError("OAUTHBEARER goes with one of sasl_oauth_token_file and sasl_oauth_aws_region")
        if self.sasl_oauth_token_file and self.sasl_oauth_aws_region:
            raise ValueError("sasl_oauth_token_file and sasl_oauth_aws_region exclude each other")
        if uses_sasl and self.sasl_mechanism is None:
            raise ValueError(f"security_protocol {self.security_protocol} needs a sasl_mechanism")
        if uses_tokens and (self.sasl_username or self.sasl_password):
            raise ValueError("sasl_mechanism OAUTHBEARER takes no sasl_username and no sasl_password")
        if uses_sasl and not uses_tokens and (not self.sasl_username or self.sasl_password is None):
            raise ValueError(f"sasl_mechanism {self.sasl_mechanism} needs sasl_username and sasl_password")
        if not uses_sasl and (self.sasl_mechanism or self.sasl_username or self.sasl_password):
            # Otherwise a password would be set and the connection would go out without any login.
            raise ValueError(f"sasl_* is set, but security_protocol is {self.security_protocol}; use SASL_SSL")
        if not self.uses_tls and (self.ssl_cafile or self.ssl_certfile or self.ssl_keyfile):
            raise ValueError(
                f"ssl_* files are set, but security_protocol is {self.security_protocol}; use SSL or SASL_SSL"
            )
        if (self.ssl_keyfile or self.ssl_key_password) and not self.ssl_certfile:
            raise ValueError("ssl_keyfile or ssl_key_password is set without ssl_certfile")
        if 2 * self.heartbeat_interval_ms > self.session_timeout_ms:
            raise ValueError("session_timeout_ms must be twice heartbeat_interval_ms, or one lost heartbeat evicts")
        return self

    @property
    def uses_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.security_protocol.endswith("SSL")

    def rebalance_timeout_for(self, drain_timeout_s: float) -> int:
        """How long in ms a rebalance must wait for a worker that drains this long and then commits."""
        return self.rebalance_timeout_ms or round(drain_timeout_s * 1000) + AFTER_DRAIN_MS
