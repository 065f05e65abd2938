"""Every metric of a process, typed, in one registry; vLLM's names under ``nanovllm_`` where there are any."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import fsum
from threading import Lock
from typing import Any, Self

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from nanovllm.statistics import EngineStats

MAX_PENDING_VALUES = 512
"""Values of a histogram that wait to be counted."""
MAX_ROUTES = 100
"""Routes that are told apart."""
OTHER_ROUTE = "other"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)


class _KeptChildren(MetricWrapperBase):
    """Keeps the child of each combination of labels: prometheus_client looks it up under a lock, several a job."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._kept: dict[tuple[object, ...], Self] = {}
        super().__init__(*args, **options)

    def labels(self, *values: object, **named: object) -> Self:
        child = None if named else self._kept.get(values)
        if child is None:
            child = super().labels(*values, **named)
            if not named:
                self._kept[values] = child
        return child


class _Counter(_KeptChildren, Counter):
    def inc(self, amount: float = 1, exemplar: dict[str, str] | None = None) -> None:
        if amount > 0 and exemplar is None and self._is_observable():
            self._value.inc(amount)
        else:
            super().inc(amount, exemplar)


class _Gauge(_KeptChildren, Gauge):
    """A gauge of the partitions that a worker has now, by topic and number."""

    def show(self, values: Mapping[tuple[str, int], float]) -> None:
        """Set each partition's value; those that have left must not go on showing their last one."""
        for gone in self._kept.keys() - values.keys():
            del self._kept[gone]
            self.remove(*gone)
        for labels, value in values.items():
            self.labels(*labels).set(value)


class _Histogram(_KeptChildren, Histogram):
    """Keeps what was observed as a list, and counts it into the buckets by the hundred and before a scrape.

    prometheus_client compares each value with the bounds in Python, and takes two locks for it, a dozen times a job.
    """

    def _metric_init(self) -> None:
        super()._metric_init()
        self._pending: list[float] = []
        self._counting = Lock()

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        if exemplar is not None:
            super().observe(amount, exemplar)
            return
        self._pending.append(amount)
        if len(self._pending) >= MAX_PENDING_VALUES:
            self._count()

    def _count(self) -> None:
        with self._counting:
            # A copy and a cut, each in one operation: what another thread adds between them stays for the next time.
            pending = self._pending[:]
            del self._pending[: len(pending)]
            pending.sort()
            self._sum.inc(fsum(pending))
            below = 0
            for bound, bucket in zip(self._upper_bounds, self._buckets, strict=True):
                upto = bisect_right(pending, bound, below)
                if upto > below:
                    bucket.inc(upto - below)
                below = upto

    def _child_samples(self) -> Iterable[Sample]:
        self._count()
        return super()._child_samples()


def totals_by(counter: Counter, label: str) -> dict[str, float]:
    """The totals of a counter by the values of one of its labels; may be called in any thread."""
    totals: dict[str, float] = {}
    for family in counter.collect():
        for sample in family.samples:
            if sample.name.endswith("_total"):
                totals[sample.labels[label]] = totals.get(sample.labels[label], 0.0) + sample.value
    return totals


class Metrics:
    """The registry of one worker. A process may hold several (tests do): nothing here is global."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.worker = Info(
            "nanovllm_worker",
            "1, with version, model, revision and backend of the worker as labels.",
            registry=self.registry,
        )

        # The delivery of jobs
        self.consumed = self._counter(
            "messaging_client_consumed_messages", "Records taken from the jobs topic.", ("topic",)
        )
        self.sent = self._counter("messaging_client_sent_messages", "Records acknowledged by Kafka.", ("topic",))
        self.jobs = self._counter("jobs", "Deliveries by how they ended.", ("outcome",))
        self.dead_letters = self._counter(
            "dead_letters", "Jobs that failed for good.", ("error_class", "code", "stage")
        )
        self.events = self._counter("events", "Events of object stores by what came of them.", ("outcome",))
        self.pages = self._counter(
            "document_pages",
            "Pages of documents by how they ended, where their answer came from, and their route.",
            ("status", "source", "route"),
        )
        self.documents = self._counter(
            "documents", "Deliveries of documents by their route and how they ended.", ("route", "outcome")
        )
        self.document_infer_seconds = self._counter(
            "document_infer_seconds", "Time of documents at the engine, its queue included, by their route.", ("route",)
        )
        self.engine_seconds_saved = self._counter(
            "document_engine_seconds_saved",
            "Engine time that kept, blank and stopped pages saved, by their route.",
            ("route",),
        )
        self._routes: set[str] = set()
        self.process_seconds = self._histogram(
            "messaging_process_duration_seconds", "From the receipt of a job to its settlement.", _SECONDS
        )
        self.stage_seconds = self._histogram("stage_seconds", "Time of a job in each stage.", _SECONDS, ("stage",))
        self.jobs_in_flight = self._gauge("jobs_in_flight", "Jobs between Kafka and settlement.")
        self.admitted_bytes = self._gauge("admitted_bytes", "Bytes of records and images held by those jobs.")
        self.fetched_bytes = self._counter("fetched_bytes", "Bytes read from the object store.")
        self.fetched_objects = self._counter("fetched_objects", "Objects read from the object store.")
        self.reuse = self._counter(
            "reuse",
            "Images read, images prepared and answers computed: for another job already, or not.",
            ("stage", "reuse"),
        )
        self.clamped_priorities = self._counter(
            "priorities_clamped", "Jobs whose priority was outside of the range that the settings allow."
        )
        self.retries = self._counter("retries", "Attempts that failed and were repeated in place.", ("stage",))
        self.consumer_lag = self._partition_gauge(
            "consumer_lag_records", "Records of a partition that are not finished."
        )
        self.watermark = self._partition_gauge(
            "consumer_watermark_offset", "Offset up to which a partition is finished."
        )
        self.tombstones = self._counter("tombstones", "Records of jobs topics without a value.", ("topic",))
        self.overtaken = self._counter(
            "records_overtaken",
            "Offsets that retention, or the deletion of their topic, removed before they were finished.",
            ("topic", "partition"),
        )
        self.engine_idle_seconds = self._counter(
            "engine_idle_seconds",
            "Time in which the engine computed no text, by what it waited for.",
            ("reason",),
        )
        self.is_systemic = self._gauge("systemic", "1 while no work is taken because nothing can succeed.")
        self.start_seconds = self._gauge(
            "start_seconds", "Time of each phase of the start; phases run beside one another.", ("phase",)
        )
        self.event_loop_lag_seconds = self._gauge(
            "event_loop_lag_seconds", "How late the event loop's last tick was; heartbeats to Kafka share it."
        )

        # Requests, under vLLM's names
        self.request_success = self._counter("request_success", "Finished requests.", ("finished_reason",))
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From the engine's receipt to the first token.", _SECONDS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Mean time between the tokens of a request.", _TOKEN_SECONDS
        )
        self.request_queue_time = self._histogram(
            "request_queue_time_seconds", "Time of a request in the engine before its first step.", _SECONDS
        )
        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds", "From the engine's receipt to the finished text.", _SECONDS
        )
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens of a request.", _TOKENS
        )
        self.images = self._counter("images", "Images by where their embedding came from.", ("outcome",))

    def route(self, name: str) -> str:
        """The label of a route: its name; ``other`` for none, and for those after the first ``MAX_ROUTES``."""
        if name and len(self._routes) < MAX_ROUTES:
            self._routes.add(name)
        return name if name in self._routes else OTHER_ROUTE

    def watch_engine(self, snapshot: Callable[[], EngineStats]) -> None:
        """Add the engine's own figures, read anew at every scrape; ``snapshot`` is called in the scraping thread."""
        self.registry.register(_EngineCollector(snapshot))

    def watch_page_store(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Add the figures of the page store, by what became of a page that was asked for or given."""
        self.registry.register(_PageStoreCollector(counts))

    def exposition(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return _Counter(f"nanovllm_{name}", text, tuple(labels), registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
        return Gauge(f"nanovllm_{name}", text, tuple(labels), registry=self.registry)

    def _partition_gauge(self, name: str, text: str) -> _Gauge:
        return _Gauge(f"nanovllm_{name}", text, ("topic", "partition"), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float], labels: Iterable[str] = ()) -> Histogram:
        return _Histogram(f"nanovllm_{name}", text, tuple(labels), registry=self.registry, buckets=tuple(buckets))


class _EngineCollector(Collector):
    def __init__(self, snapshot: Callable[[], EngineStats]) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        return ()  # registering must not ask an engine that is not started

    def collect(self) -> Iterator[Metric]:
        stats = self._snapshot()
        yield _gauge("num_requests_running", "Requests in the engine's steps.", stats.num_requests_running)
        yield _gauge("num_requests_waiting", "Requests that wait for a place.", stats.num_requests_waiting)
        yield _gauge("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it.", stats.kv_cache_usage)
        yield _counter("num_preemptions", "Requests whose KV was dropped and computed again.", stats.num_preemptions)
        yield _counter("engine_steps", "Steps of the engine.", stats.steps)
        yield _counter("prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens)
        yield _counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
        yield _counter("prefix_cache_queries", "Tokens looked up in the prefix cache.", stats.prefix_cache_queries)
        yield _counter("prefix_cache_hits", "Tokens found in the prefix cache.", stats.prefix_cache_hits)
        yield _counter("spec_decode_draft_tokens", "Tokens guessed ahead.", stats.spec_decode_draft_tokens)
        yield _counter("spec_decode_accepted_tokens", "Of those the right ones.", stats.spec_decode_accepted_tokens)
        yield _counter("encoder_images", "Images that went through the vision tower.", stats.encoder_images)
        yield _counter("encoder_seconds", "Time in the vision tower and projector.", stats.encoder_seconds)
        yield from _endpoints(stats)
        cache = stats.embedding_cache
        if cache is None:
            return
        yield _counter("embedding_cache_hits", "Images answered from the embedding cache.", cache.hits)
        yield _counter("embedding_cache_misses", "Images that had to be encoded.", cache.misses)
        yield _counter("embedding_cache_joined", "Images that waited for an equal one in work.", cache.joined)
        yield _counter("embedding_cache_evictions", "Embeddings dropped for room.", cache.evictions)
        yield _gauge("embedding_cache_entries", "Embeddings held.", cache.entries)
        yield _gauge("embedding_cache_bytes", "Bytes that they hold.", cache.bytes)
        yield _gauge("embedding_cache_max_bytes", "Bytes that they may hold.", cache.max_bytes)
        yield _counter("embedding_cache_hits_by_file", "Hits before anything was decoded.", cache.hits_by_file)
        yield _counter("embedding_cache_seconds_saved", "Encoder seconds that hits saved.", cache.seconds_saved)
        hits = CounterMetricFamily("nanovllm_embedding_cache_tier_hits", "Hits by tier.", labels=("tier",))
        held = GaugeMetricFamily("nanovllm_embedding_cache_tier_bytes", "Bytes held by tier.", labels=("tier",))
        for tier in cache.tiers:
            hits.add_metric((tier.name,), tier.hits)
            held.add_metric((tier.name,), tier.bytes)
        yield hits
        yield held


def _endpoints(stats: EngineStats) -> Iterator[Metric]:
    if not stats.endpoints:
        return
    name = "nanovllm_endpoint"
    is_up = GaugeMetricFamily(f"{name}_up", "1 while an endpoint takes requests.", labels=("endpoint",))
    running = GaugeMetricFamily(f"{name}_requests_running", "Requests at an endpoint.", labels=("endpoint",))
    requests = CounterMetricFamily(f"{name}_requests", "Requests sent to an endpoint.", labels=("endpoint",))
    faults = CounterMetricFamily(f"{name}_faults", "Faults of an endpoint by kind.", labels=("endpoint", "kind"))
    for one in stats.endpoints:
        is_up.add_metric((one.url,), int(one.is_up))
        running.add_metric((one.url,), one.running)
        requests.add_metric((one.url,), one.requests)
        for kind, number in one.faults:
            faults.add_metric((one.url, kind), number)
    yield from (is_up, running, requests, faults)


class _PageStoreCollector(Collector):
    def __init__(self, counts: Callable[[], Mapping[str, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        pages = CounterMetricFamily(
            "nanovllm_page_store_pages", "Pages asked of the page store, or given to it.", labels=("outcome",)
        )
        for outcome, count in self._counts().items():
            pages.add_metric((outcome,), count)
        yield pages


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"nanovllm_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"nanovllm_{name}", text, value=value)
