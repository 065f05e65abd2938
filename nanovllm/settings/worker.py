"""Settings of a worker: all sections, and the rules between them."""

from __future__ import annotations

import socket
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

import yaml
from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from nanovllm.settings.admission import AdmissionSettings
from nanovllm.settings.base import MAX_TOPIC_CHARS, SettingsModel
from nanovllm.settings.documents import DocumentSettings
from nanovllm.settings.engine import EngineSettings, SamplingSettings
from nanovllm.settings.failures import DeadLetterSettings, RetrySettings, retry_topic
from nanovllm.settings.http_images import HttpImageSettings
from nanovllm.settings.images import ImageSettings, ReuseSettings
from nanovllm.settings.kafka import KafkaSettings
from nanovllm.settings.kubernetes import KubernetesSettings
from nanovllm.settings.remote import RemoteSettings
from nanovllm.settings.s3 import S3Settings
from nanovllm.settings.tenants import TenantSettings
from nanovllm.settings.topics import TopicSettings
from nanovllm.settings.vllm import VllmSettings

ENV_PREFIX = "NANOVLLM_"


class HttpSettings(SettingsModel):
    """The worker's own endpoints: `/healthz`, `/readyz`, `/startupz`, `/metrics`, `/stats` and a page over it."""

    # Probes and scrapes come from outside the pod.
    host: str = Field("0.0.0.0", description="Address to listen on.")  # noqa: S104
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    cost_per_hour: float | None = Field(
        None, ge=0, description="Price of this worker's hour, for the costs on its status page; unset: seconds alone."
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
    log_format: Literal["text", "json"] = Field(
        "text",
        description="`json`: an object a line, with `worker_id`, and with `job_id`, `topic`, `partition` and `offset` "
        "where a line is about a job.",
    )
    replicas: int = Field(
        1,
        ge=1,
        description="Worker processes that `nanovllm worker` starts, each on its share of the cores and with its own "
        "group membership; replica i listens on http.port + i, and its names end in -i.",
    )
    kafka: KafkaSettings = KafkaSettings()
    topics: TopicSettings = TopicSettings()
    s3: S3Settings = S3Settings()
    http_images: HttpImageSettings = HttpImageSettings()
    http: HttpSettings = HttpSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()
    engine: EngineSettings = EngineSettings()
    remote: RemoteSettings = RemoteSettings()
    vllm: VllmSettings = VllmSettings()
    sampling: SamplingSettings = SamplingSettings()
    images: ImageSettings = ImageSettings()
    documents: DocumentSettings = DocumentSettings()
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
        if self.engine.backend == "openai" and not self.remote.endpoints:
            raise ValueError("engine.backend is openai: name its servers in remote.endpoints")
        if self.engine.backend != "openai" and self.remote.endpoints:
            raise ValueError(
                f"remote.endpoints names servers, and engine.backend is {self.engine.backend}, which asks none: set it "
                "to openai, or unset them"
            )
        if self.engine.backend != "vllm" and self.vllm != VllmSettings():
            raise ValueError(
                f"vllm.* is set, and engine.backend is {self.engine.backend}: set it to vllm, or unset the section"
            )
        if self.replicas > 1 and self.kubernetes.pod_deletion_cost:
            raise ValueError("replicas and kubernetes.pod_deletion_cost exclude each other: one pod has one cost")
        self._check_topics()
        max_jobs, num_priorities = self.admission.max_jobs, len(set(self.consumed_topics.values()))
        if max_jobs is not None and max_jobs < num_priorities:
            raise ValueError(
                "admission.max_jobs must have a place for each priority of topics.lanes, and one for topics.jobs"
            )
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
        retry_topics = [
            retry_topic(name, delay_s) for name in self.consumed_topics for delay_s in self.retries.delays_s
        ]
        uses = [(topics.jobs, "topics.jobs"), *((name, "topics.lanes") for name in topics.lanes)]
        uses += [(name, "retries.delays_s") for name in retry_topics]
        uses += [
            (getattr(topics, name), f"topics.{name}")
            for name in ("results", "metrics", "dead_letters", "events", "in_flight", "replayed")
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
    def consumed_topics(self) -> dict[str, int]:
        """The topics of jobs, and that of events where there are routes, with their priorities."""
        events = {} if self.documents.routes is None else {self.topics.events: 0}
        return {**self.topics.job_topics, **events}

    def max_admitted_jobs(self, max_num_seqs: int) -> int:
        """Most jobs between Kafka and result: the horizon of priority, order and dedup.

        ``max_num_seqs``: the most that the engine, which is there now, runs at once.
        """
        return self.admission.max_jobs or max(2 * max_num_seqs, len(set(self.consumed_topics.values())))

    def masked_yaml(self) -> str:
        """The effective values in the form of a configuration file; secrets, and passwords inside URLs, are masked."""
        values = self.model_dump(mode="json")
        values["s3"]["endpoint_url"] = _mask_userinfo(self.s3.endpoint_url)
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _mask_userinfo(url: str | None) -> str | None:
    if url is None:
        return None
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    return urlunsplit(parts._replace(netloc="**********@" + parts.netloc.rpartition("@")[2]))
