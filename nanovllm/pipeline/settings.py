"""Settings of the worker and the command line: ``NANOVLLM_`` variables, or a YAML or TOML file with the same names.

Every field is documented where it is defined; ``docs/settings.md`` is generated from here. Environment variables win
over the file. An unknown name is an error in both: a misspelt limit that is silently ignored is worse than a refusal to
start.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import yaml
from aiokafka.abc import AbstractTokenProvider
from pydantic import BaseModel, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from nanovllm.errors import ConfigurationError, ForbiddenUri
from nanovllm.messages.validation import describe_errors
from nanovllm.pipeline.failure_settings import DeadLetterSettings, RetrySettings, retry_topic
from nanovllm.pipeline.login_tokens import MskIamToken, TokenFile
from nanovllm.pipeline.section import MAX_TOPIC_CHARS, Bytes, Millis, Seconds, Section, StrList, TopicList, TopicName
from nanovllm.pipeline.tenant_settings import TenantSettings
from nanovllm.sampling_params import SamplingParams

# What a worker needs after its drain and before it joins again: the last commit, which may wait for brokers.
AFTER_DRAIN_MS = 15_000
JOIN_MARGIN_MS = 5_000

ENV_PREFIX = "NANOVLLM_"
CONFIG_VARIABLE = "NANOVLLM_CONFIG"
BATCH_BYTES = 256 * 1024

# What Kubernetes injects into every pod for a Service called nanovllm (or nanovllm-…): never settings of ours. The
# double underscore of our own levels keeps NANOVLLM_HTTP__PORT apart from them.
_KUBERNETES_SERVICE = re.compile(
    r"^NANOVLLM(_[A-Z0-9]+)*_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$"
)


class KafkaSettings(Section):
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
    heartbeat_interval_ms: Millis = Field(3_000, description="Time between heartbeats; a third of the session timeout.")
    rebalance_timeout_ms: Millis | None = Field(
        None, description="Longest time a rebalance waits for a draining worker; unset: the drain's budget and 15 s."
    )
    max_poll_interval_ms: Millis = Field(
        300_000, description="A worker that polls no more for this long leaves the group."
    )
    transaction_timeout_ms: Millis = Field(
        30_000,
        description="With `exactly_once`: a transaction of a worker that died holds readers up at most this long.",
    )
    fetch_max_bytes: Bytes = Field(50 * 2**20, description="Most bytes of one fetch from a broker.")
    max_partition_fetch_bytes: Bytes = Field(2**20, description="Most bytes of one fetch from one partition.")
    max_request_bytes: Bytes = Field(2**20, description="Largest message that is sent; at most the topics' own limit.")
    compression_type: Literal["gzip", "lz4", "snappy", "zstd"] | None = Field(
        None, description="Compression of what is sent; every kind is read."
    )
    linger_ms: int = Field(5, ge=0, description="Wait for more messages before a batch is sent.")

    @field_validator("bootstrap_servers")
    @classmethod
    def _check_ports(cls, servers: str) -> str:
        if any(int(port) > 65_535 for port in re.findall(r":(\d{1,9})(?=,|\s|$)", servers)):
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

    def ssl_context(self) -> ssl.SSLContext | None:
        """The TLS context for aiokafka, or None without TLS.

        Raises:
            ConfigurationError: a file that is missing or holds no usable certificate or key.
        """
        if not self.uses_tls:
            return None
        try:
            context = ssl.create_default_context(cafile=str(self.ssl_cafile) if self.ssl_cafile else None)
            context.check_hostname = self.ssl_check_hostname
            if self.ssl_certfile:
                # A callable in place of None: OpenSSL would otherwise ask on the terminal and block the worker.
                password = self.ssl_key_password.get_secret_value() if self.ssl_key_password else ""
                context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, password=lambda: password)
        except (OSError, ssl.SSLError) as error:
            reason = error.strerror or getattr(error, "reason", None) or type(error).__name__
            raise ConfigurationError(
                f"kafka.ssl_cafile, ssl_certfile or ssl_keyfile cannot be used: {reason}"
            ) from error
        return context

    def client_kwargs(self) -> dict[str, Any]:
        """Arguments that every aiokafka client takes: brokers, TLS and login."""
        kwargs: dict[str, Any] = {
            "bootstrap_servers": self.bootstrap_servers,
            "client_id": self.client_id,
            "metadata_max_age_ms": self.metadata_max_age_ms,
            "request_timeout_ms": self.request_timeout_ms,
            "security_protocol": self.security_protocol,
            "ssl_context": self.ssl_context(),
        }
        if self.sasl_oauth_token_file:
            provider: AbstractTokenProvider = TokenFile(self.sasl_oauth_token_file)
            kwargs |= {"sasl_mechanism": self.sasl_mechanism, "sasl_oauth_token_provider": provider}
        elif self.sasl_oauth_aws_region:
            provider = MskIamToken.in_region(self.sasl_oauth_aws_region)
            kwargs |= {"sasl_mechanism": self.sasl_mechanism, "sasl_oauth_token_provider": provider}
        elif self.sasl_mechanism and self.sasl_password:
            kwargs |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.sasl_username,
                "sasl_plain_password": self.sasl_password.get_secret_value(),
            }
        return kwargs

    def rebalance_timeout_for(self, drain_timeout_s: float) -> int:
        """How long in ms a rebalance must wait for a worker that drains this long and then commits."""
        return self.rebalance_timeout_ms or round(drain_timeout_s * 1000) + AFTER_DRAIN_MS

    def consumer_kwargs(self, *, drain_timeout_s: float = 0.0) -> dict[str, Any]:
        """Arguments of the worker's AIOKafkaConsumer; offsets are never committed behind its back."""
        rebalance_timeout_ms = self.rebalance_timeout_for(drain_timeout_s)
        return self.client_kwargs() | {
            "group_id": self.group_id,
            "group_instance_id": self.group_instance_id,
            # The answer to JoinGroup comes when the slowest member has drained.
            "request_timeout_ms": max(self.request_timeout_ms, rebalance_timeout_ms + JOIN_MARGIN_MS),
            # The source finds lost places itself, and counts what retention took.
            "auto_offset_reset": "none",
            "enable_auto_commit": False,
            "isolation_level": "read_committed",
            "session_timeout_ms": self.session_timeout_ms,
            "heartbeat_interval_ms": self.heartbeat_interval_ms,
            "rebalance_timeout_ms": rebalance_timeout_ms,
            "max_poll_interval_ms": self.max_poll_interval_ms,
            "fetch_max_bytes": self.fetch_max_bytes,
            "max_partition_fetch_bytes": self.max_partition_fetch_bytes,
        }

    def producer_kwargs(self) -> dict[str, Any]:
        """Arguments of an AIOKafkaProducer whose sends are acknowledged by all replicas, once and in order."""
        return self.client_kwargs() | {
            "acks": "all",
            "enable_idempotence": True,
            "max_request_size": self.max_request_bytes,
            "compression_type": self.compression_type,
            "linger_ms": self.linger_ms,
            # One batch of a partition is under way at a time: at aiokafka's 16 KiB that is some 25 dead letters.
            "max_batch_size": BATCH_BYTES,
        }

    def transactional_kwargs(self, topic: str, partition: int) -> dict[str, Any]:
        """Arguments of the AIOKafkaProducer for what comes of one input partition, with `delivery: exactly_once`."""
        return self.producer_kwargs() | {
            # No topic has a slash in its name: two partitions never share an id.
            "transactional_id": f"{self.group_id}/{topic}/{partition}",
            "transaction_timeout_ms": self.transaction_timeout_ms,
            # A transaction is a batch already; and its brokers are often busy with the one before, for milliseconds.
            "linger_ms": 0,
            "retry_backoff_ms": 20,
        }


class TopicSettings(Section):
    """Names of the topics."""

    jobs: TopicName = Field("nanovllm.jobs", description="Jobs come from here.")
    results: TopicName = Field("nanovllm.results", description="Results go here, keyed by `job_id`.")
    metrics: TopicName = Field("nanovllm.metrics", description="One record of figures for each job goes here.")
    dead_letters: TopicName = Field("nanovllm.dead-letters", description="Jobs that failed for good go here.")
    in_flight: TopicName = Field("nanovllm.in-flight", description="Record of the jobs in the engines.")
    lanes: dict[TopicName, int] = Field(
        default_factory=dict,
        description="More topics of jobs, each with a priority (JSON object): lower goes first, `topics.jobs` has 0. "
        "Each lane has a share of the worker's window and its own retry topics.",
    )
    reply_to: TopicList = Field((), description="Topics that a job's `reply_to` may name; any other is refused.")

    @property
    def job_topics(self) -> dict[str, int]:
        """Every topic of jobs and its priority, the most urgent one first."""
        return dict(sorted({self.jobs: 0, **self.lanes}.items(), key=lambda item: item[1]))

    def result_topic(self, reply_to: str | None) -> str:
        """Where a job's result goes.

        Raises:
            ForbiddenUri: ``reply_to`` names a topic that is not allowed: a job must not write wherever the worker may.
        """
        if reply_to is None or reply_to == self.results:
            return self.results
        if reply_to not in self.reply_to:
            raise ForbiddenUri("reply_to: this topic is not listed in topics.reply_to")
        return reply_to


class S3Settings(Section):
    """The object store; credentials come from the AWS SDK's own variables, files and roles."""

    endpoint_url: str | None = Field(None, description="Another S3 than AWS's, such as `http://minio:9000`.")
    region: str | None = Field(None, description="Region; unset: the AWS SDK's own settings.")
    addressing_style: Literal["auto", "path", "virtual"] = Field(
        "auto", description="`path` for most other S3 servers."
    )
    allow: StrList = Field((), description="`s3://bucket/prefix` list that jobs may read; unset: nothing may be read.")
    connect_timeout_s: Seconds = Field(5.0, description="Longest wait for a connection.")
    read_timeout_s: Seconds = Field(20.0, description="Longest silence while an object is read.")
    max_attempts: int = Field(4, ge=1, le=20, description="Attempts at one object before the job is a dead letter.")
    max_connections: int = Field(16, ge=1, description="Objects that are read at the same time.")
    large_results: str | None = Field(
        None, description="`s3://bucket/prefix` for results too large for a message; unset: those are dead letters."
    )
    large_result_bytes: Bytes | None = Field(
        None, description="Larger results go there; unset: only those that their topic does not take."
    )

    @model_validator(mode="after")
    def _check_allow(self) -> S3Settings:
        if self.large_result_bytes is not None and self.large_results is None:
            raise ValueError("large_result_bytes is set without large_results, the place where they go")
        for entry in (*self.allow, *([self.large_results] if self.large_results else [])):
            if not re.fullmatch(r"s3://[A-Za-z0-9][A-Za-z0-9.\-_]{1,62}(/.*)?", entry, re.DOTALL):
                raise ValueError("allow and large_results have the form s3://bucket or s3://bucket/prefix")
        return self


class HttpSettings(Section):
    """The worker's own endpoints: `/healthz`, `/readyz`, `/metrics`."""

    # Probes and scrapes come from outside the pod.
    host: str = Field("0.0.0.0", description="Address to listen on.")  # noqa: S104
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")


class EngineSettings(Section):
    """The model and the limits of the engine."""

    model: str | None = Field(
        None, description="Checkpoint directory, alias or cached hub name; unset: the shipped tiny model."
    )
    backend: Literal["native", "echo"] = Field(
        "native", description="`echo` answers with the prompt: for tests of the pipeline."
    )
    model_aliases: dict[str, str] = Field(
        default_factory=dict, description="Short names for checkpoint directories (JSON object)."
    )
    max_num_seqs: int = Field(64, ge=1, description="Most jobs in one step of the engine.")
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="Most tokens in one step of the engine; unset: 512 on a CPU, 2048 on a GPU."
    )
    max_model_len: int | None = Field(None, ge=1, description="Longest sequence in tokens; unset: the checkpoint's.")
    block_size: int | None = Field(
        None, ge=1, description="Tokens in a block of the KV cache; unset: the attention backend's."
    )
    kv_cache_bytes: Bytes | None = Field(
        None, description="Size of the KV cache; unset: by gpu_memory_utilization, or 1 GiB on a CPU."
    )
    kv_cache_dtype: Literal["auto", "bfloat16"] = Field(
        "auto", description="`auto`: the model's own type; `bfloat16` halves the cache of a float32 model, on a CPU."
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of the GPU's memory that the engine takes."
    )
    enforce_eager: bool = Field(False, description="Record no CUDA graphs: a quicker start, slower small steps.")
    embedding_cache_bytes: int = Field(256 * 2**20, ge=0, description="Size of the cache of image embeddings.")
    embedding_cache_host_bytes: int = Field(
        0, ge=0, description="Size of its second tier, in the host's memory, for what leaves a GPU's."
    )
    min_pixels: int | None = Field(
        None, ge=1, description="Least area of an image, for models that take images at their own size; unset: theirs."
    )
    max_pixels: int | None = Field(None, ge=1, description="Largest area of an image, for such models; unset: theirs.")
    max_image_tokens: int | None = Field(
        None, ge=1, description="Most tokens of one image, for such models: lowers max_pixels."
    )
    max_images_per_request: int = Field(16, ge=0, description="Most images of one job.")
    enable_prefix_caching: bool = Field(True, description="Reuse the KV of equal beginnings.")
    num_speculative_tokens: int = Field(
        8, ge=0, description="Most tokens that a job guesses ahead from earlier text, verified in one step; 0: none."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field("auto", description="Type of the weights at work.")
    device: str | None = Field(None, description="`cpu`, `cuda`, `cuda:1`; unset: a GPU where there is one.")
    quantization: Literal["int8"] | None = Field(
        None, description="`int8`: weights and products of the text model's linear layers in 8 bits, on a CPU."
    )
    deterministic: bool = Field(
        False, description="The same bits of a text whatever is computed beside it; on a CPU with a C++ compiler."
    )
    step_timeout_s: Seconds = Field(300.0, description="A step that takes longer ends the worker: it hangs.")


class SamplingSettings(SamplingParams):
    """What a job gets where its own `sampling` says nothing; the names are those of `sampling`."""

    temperature: float = Field(0.0, ge=0.0, le=100.0, description="0 means greedy: the most probable token.")
    max_tokens: int = Field(256, ge=1, le=1_000_000, description="Most tokens to generate.")


class ImageSettings(Section):
    """Limits that hold before an image is decoded, and the processes that decode."""

    max_bytes: Bytes = Field(32 * 2**20, description="Largest encoded image.")
    max_pixels: int = Field(50_000_000, ge=1, description="Most pixels of one image.")
    min_side: int = Field(1, ge=1, description="Shortest side in pixels.")
    max_frames: int = Field(1, ge=1, description="Most frames or pages; above 1 the first one is used.")
    formats: StrList = Field(
        ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"),
        description="Allowed formats, by Pillow's names; `HEIF` needs the extra `heic`.",
    )
    decoders: int = Field(2, ge=1, description="Decoder processes.")
    decode_timeout_s: Seconds = Field(20.0, description="A decoder that takes longer is killed.")
    decoder_memory_bytes: Bytes = Field(2**30, description="Address space of one decoder process.")


class ReuseSettings(Section):
    """What one job has made and the next one can use. A job's own `reuse` wins over `level`, inside these bounds."""

    level: Literal["none", "images", "answers"] = Field(
        "images",
        description="`images`: read and decoded once; `answers`: an equal greedy job gets the same answer, marked so.",
    )
    image_bytes: int = Field(256 * 2**20, ge=0, description="Size of the memory of read and prepared images.")
    answer_bytes: int = Field(64 * 2**20, ge=0, description="Size of the memory of answers; 0: none, for no job.")


class AdmissionSettings(Section):
    """How much work the worker takes at once, and how long it goes on when told to stop."""

    max_jobs: int | None = Field(
        None, ge=1, description="Most jobs between Kafka and result; unset: twice engine.max_num_seqs."
    )
    max_bytes: Bytes = Field(512 * 2**20, description="Most bytes of messages and images held by those jobs.")
    max_job_bytes: Bytes = Field(8 * 2**20, description="Largest message that is read as a job.")
    max_out_of_order: int = Field(
        1_000, ge=1, description="Most offsets of a partition finished above its oldest unfinished one."
    )
    per_key_order: bool = Field(
        False, description="Jobs of a partition with equal record keys run one after another, in the topic's order."
    )
    max_tokens: int = Field(4_096, ge=1, description="Largest `max_tokens` that a job may ask for.")
    ttl_s: Seconds | None = Field(
        None,
        description="A job whose record is older has expired, as one behind its `deadline` has; unset: none.",
    )
    drain_timeout_s: Seconds = Field(
        25.0, description="After SIGTERM, or when partitions leave, jobs at work get this long."
    )
    idle_exit_s: Seconds = Field(
        5.0, description="With --exit-when-drained: leave when every partition is read and this long was idle."
    )


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=False,
    )

    delivery: Literal["at_least_once", "exactly_once"] = Field(
        "at_least_once",
        description="`at_least_once`: a repeated result has the same `result_id`. `exactly_once`: what a job sends and "
        "its offset are one transaction; readers with `read_committed` see each once, and in the order of the offsets.",
    )
    result_format: Literal["as_job", "json", "msgpack"] = Field(
        "as_job", description="Format of results and metrics; `as_job`: the one that the job came in."
    )
    worker_id: str = Field(
        default_factory=socket.gethostname,
        min_length=1,
        description="Name of this worker in results; unset: the host's name.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity that is logged."
    )
    kafka: KafkaSettings = KafkaSettings()
    topics: TopicSettings = TopicSettings()
    s3: S3Settings = S3Settings()
    http: HttpSettings = HttpSettings()
    engine: EngineSettings = EngineSettings()
    sampling: SamplingSettings = SamplingSettings()
    images: ImageSettings = ImageSettings()
    reuse: ReuseSettings = ReuseSettings()
    admission: AdmissionSettings = AdmissionSettings()
    tenants: TenantSettings = TenantSettings()
    retries: RetrySettings = RetrySettings()
    dead_letters: DeadLetterSettings = DeadLetterSettings()

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        if self.sampling.max_tokens > self.admission.max_tokens:
            raise ValueError(
                "sampling.max_tokens is above admission.max_tokens: jobs without sampling would be refused"
            )
        if self.retries.delays_s and self.admission.per_key_order:
            raise ValueError("retries.delays_s and admission.per_key_order exclude each other: a retry loses its place")
        self._check_topics()
        if self.max_admitted_jobs < len(self.topics.job_topics):
            raise ValueError("admission.max_jobs must have a place for each of topics.lanes and for topics.jobs")
        rebalance_timeout_ms = self.kafka.rebalance_timeout_for(self.admission.drain_timeout_s)
        if rebalance_timeout_ms <= self.admission.drain_timeout_s * 1000:
            raise ValueError(
                "kafka.rebalance_timeout_ms must exceed admission.drain_timeout_s, or a drain ends in eviction"
            )
        if self.kafka.max_poll_interval_ms < rebalance_timeout_ms:
            raise ValueError(
                f"kafka.max_poll_interval_ms must be at least the rebalance timeout ({rebalance_timeout_ms} ms), "
                "or a worker that waits for a draining one leaves the group"
            )
        return self

    def _check_topics(self) -> None:
        """Each topic has one use: a worker that writes dead letters or results where it reads jobs answers itself."""
        topics = self.topics
        uses = [(topics.jobs, "topics.jobs"), *((name, "topics.lanes") for name in topics.lanes)]
        uses += [
            (retry_topic(jobs, delay_s), "retries.delays_s")
            for jobs in topics.job_topics
            for delay_s in self.retries.delays_s
        ]
        uses += [
            (getattr(topics, name), f"topics.{name}") for name in ("results", "metrics", "dead_letters", "in_flight")
        ]
        uses += [(name, "topics.reply_to") for name in dict.fromkeys(topics.reply_to) if name != topics.results]
        first: dict[str, str] = {}
        for name, use in uses:
            if len(name) > MAX_TOPIC_CHARS:
                raise ValueError(f"{use}: the topic {name} has more than {MAX_TOPIC_CHARS} characters")
            if name in first:
                raise ValueError(f"{first[name]} and {use} name the same topic {name}; give each its own")
            first[name] = use

    @property
    def max_admitted_jobs(self) -> int:
        """Most jobs between Kafka and result: the horizon of priority, order and dedup."""
        return self.admission.max_jobs or 2 * self.engine.max_num_seqs

    def masked(self) -> dict[str, Any]:
        """The effective values as plain data; secrets, and passwords inside URLs, are masked."""
        values: dict[str, Any] = self.model_dump(mode="json")
        values["s3"]["endpoint_url"] = _mask_userinfo(self.s3.endpoint_url)
        return values

    def masked_yaml(self) -> str:
        """The effective values in the form of a configuration file, secrets masked."""
        return yaml.safe_dump(self.masked(), sort_keys=False, allow_unicode=True)


def load_settings(config: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Settings from a file (optional), the environment over it, and ``overrides`` (nested, as in the file) over both.

    Raises:
        ConfigurationError: an unknown name, a wrong value, or a file that cannot be read. Values are never repeated in
            the message: they may be secrets.
    """
    if unknown := list(unknown_variables(os.environ)):
        raise ConfigurationError(f"unknown settings in the environment: {', '.join(unknown)}")
    values = _read_config(config) if config else {}
    try:
        _merge(values, EnvSettingsSource(Settings)())
        _merge(values, overrides or {})
        return Settings(**values)
    except ValidationError as error:
        raise ConfigurationError(describe_errors(error, "settings")) from None
    except SettingsError as error:
        raise ConfigurationError(str(error)) from None


def unknown_variables(names: Iterable[str]) -> Iterable[str]:
    """Those of ``names`` that carry our prefix and name no setting (pydantic-settings ignores them)."""
    for name in sorted(names):
        upper = name.upper()
        if not upper.startswith(ENV_PREFIX) or upper == CONFIG_VARIABLE:
            continue
        if _is_setting(upper.removeprefix(ENV_PREFIX)) or _KUBERNETES_SERVICE.match(upper):
            continue
        yield name


def _is_setting(name: str) -> bool:
    section, *rest = name.lower().split("__")
    field = Settings.model_fields.get(section)
    if field is None:
        return False
    if not rest:
        return True
    nested = field.annotation
    fields = nested.model_fields if isinstance(nested, type) and issubclass(nested, BaseModel) else {}
    return len(rest) == 1 and rest[0] in fields


def _read_config(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"configuration file {path} cannot be read: {type(error).__name__}") from error
    try:
        if path.suffix == ".toml":
            values: Any = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            values = yaml.safe_load(text) or {}
        else:
            raise ConfigurationError(f"configuration file {path}: its name must end in .yaml, .yml or .toml")
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        # The parsers quote the line they fell on, which may hold a password: only its place is repeated.
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1})" if mark else ""
        raise ConfigurationError(f"configuration file {path} is not valid {path.suffix[1:].upper()}{place}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"configuration file {path} must hold a mapping of settings")
    return values


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(name), dict):
            _merge(below[name], value)
        else:
            below[name] = dict(value) if isinstance(value, Mapping) else value


def _mask_userinfo(url: str | None) -> str | None:
    if url is None:
        return None
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    return urlunsplit(parts._replace(netloc="**********@" + parts.netloc.rpartition("@")[2]))
