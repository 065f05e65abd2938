"""OpenTelemetry traces of jobs: their spans, the headers that carry them on, and the export in a thread of its own.

It needs the extra ``otel``, and is imported where ``tracing.enabled`` is set alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.environment_variables import (
    OTEL_EXPORTER_OTLP_CERTIFICATE,
    OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE,
    OTEL_EXPORTER_OTLP_CLIENT_KEY,
    OTEL_EXPORTER_OTLP_ENDPOINT,
    OTEL_EXPORTER_OTLP_HEADERS,
    OTEL_EXPORTER_OTLP_PROTOCOL,
    OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE,
    OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE,
    OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY,
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT,
    OTEL_EXPORTER_OTLP_TRACES_HEADERS,
    OTEL_EXPORTER_OTLP_TRACES_PROTOCOL,
)
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.re import parse_env_headers
from opentelemetry.util.types import AttributeValue

from nanovllm.errors import ConfigurationError
from nanovllm.kafka.records import Headers
from nanovllm.messages.dead_letter import Stage
from nanovllm.objects.daemon_threads import DaemonThreads
from nanovllm.settings.worker import Settings
from nanovllm.sinks.kept_headers import TRACE_HEADERS

logger = logging.getLogger(__name__)

Attributes = Mapping[str, AttributeValue]

FLUSH_S = 3.0
"""Longest wait for the receiver when the worker ends."""
PROTOCOL = "http/protobuf"
_FILES = (
    *(OTEL_EXPORTER_OTLP_CERTIFICATE, OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE),
    *(OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE, OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE),
    *(OTEL_EXPORTER_OTLP_CLIENT_KEY, OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY),
)
_MAX_CHARS = {"traceparent": 128, "tracestate": 512}
_PROPAGATOR = TraceContextTextMapPropagator()
_KINDS: dict[Stage, SpanKind] = {"publish": SpanKind.PRODUCER}


class Tracing:
    """Begins a trace for each record, or continues that of its headers."""

    def __init__(self, provider: TracerProvider, group_id: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("nanovllm", version("nanovllm"))
        self._group_id = group_id

    @classmethod
    def of(cls, settings: Settings, exporter: SpanExporter | None = None) -> Tracing:
        """As ``settings`` and OpenTelemetry's variables say; ``exporter`` in place of one to an OTLP receiver.

        Raises:
            ConfigurationError: a variable of OpenTelemetry has a value that it does not take.
        """
        own = Resource(
            {
                "service.name": "nanovllm-worker",
                "service.version": version("nanovllm"),
                "service.instance.id": settings.worker_id,
            }
        )
        ratio = settings.tracing.sample_ratio
        try:
            provider = TracerProvider(
                resource=Resource.create().merge(own).merge(OTELResourceDetector().detect()),
                sampler=None if ratio is None else ParentBased(TraceIdRatioBased(ratio)),
                # It would wait for a receiver that does not answer when the process ends.
                shutdown_on_exit=False,
            )
            provider.add_span_processor(BatchSpanProcessor(ReportedExporter(exporter or _otlp_exporter())))
        except ValueError as error:
            raise ConfigurationError(f"a variable OTEL_* has a wrong value: {error}") from error
        if exporter is None:
            logger.info("spans go to %s", _receiver())
        return cls(provider, settings.kafka.group_id)

    def begin(self, topic: str, partition: int, offset: int, headers: Headers) -> JobTrace:
        """The trace of a record that is received now; headers that are no trace context count as none."""
        span = self._tracer.start_span(
            f"process {topic}",
            _parent(headers),
            kind=SpanKind.CONSUMER,
            attributes={
                "messaging.system": "kafka",
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": topic,
                "messaging.destination.partition.id": str(partition),
                "messaging.kafka.offset": offset,
                "messaging.consumer.group.name": self._group_id,
            },
        )
        return JobTrace(self._tracer, span)

    async def close(self) -> None:
        """Export what waits, for at most ``FLUSH_S``; spans that end later are lost."""
        try:
            async with asyncio.timeout(FLUSH_S):
                await DaemonThreads("nanovllm-tracing", idle_s=0.0).run(self._provider.shutdown)
        except TimeoutError:
            logger.warning("the last spans are lost: their receiver did not take them within %.0f s", FLUSH_S)


@dataclass
class _StageTime:
    """Monotonic times of the first entry into a stage and of the last exit, and the seconds inside."""

    began: float
    ended: float
    seconds: float


class JobTrace:
    """The spans of one record, or of one of several events in it; owned by one task.

    A stage becomes a span when the job ends: what is timed in pieces, as by attempts, is one span.
    """

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._wall_ns = time.time_ns() - time.monotonic_ns()
        self._stages: dict[Stage, _StageTime] = {}
        self._joined: list[SpanContext] = []
        self._parts: list[JobTrace] = []
        self._is_open = True

    @property
    def is_recorded(self) -> bool:
        """Whether it was sampled: its spans are exported."""
        return self._span.is_recording()

    @property
    def context(self) -> SpanContext:
        """That of the span of the whole."""
        return self._span.get_span_context()

    def carried(self, headers: Headers) -> Headers:
        """``headers`` with this trace in place of theirs."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, set_span_in_context(self._span))
        if not carrier:
            return headers  # OTEL_SDK_DISABLED
        own = [(name, value.encode()) for name, value in carrier.items()]
        return (*own, *(header for header in headers if header[0].lower() not in TRACE_HEADERS))

    def part(self) -> JobTrace:
        """The trace of one of the record's events."""
        span = self._tracer.start_span("process event", set_span_in_context(self._span))
        self._parts.append(JobTrace(self._tracer, span))
        return self._parts[-1]

    def add_stage(self, name: Stage, began: float, ended: float) -> None:
        """Count a time in the stage ``name``, between two monotonic times."""
        known = self._stages.setdefault(name, _StageTime(began, ended, 0.0))
        known.began, known.ended = min(began, known.began), max(ended, known.ended)
        known.seconds += ended - began

    def join(self, others: Iterable[JobTrace]) -> None:
        """Link its publication with those of ``others``, whose records were published with its own."""
        for other in others:
            self._joined.append(other.context)
            other._joined.append(self.context)

    def end(
        self,
        outcome: str | None,
        attributes: Attributes | None = None,
        of_stages: Mapping[Stage, Attributes] | None = None,
        failure: tuple[Stage, str] | None = None,
    ) -> None:
        """End all spans. ``failure``: the stage that failed, and the code of its error."""
        if not self._is_open:
            return
        self._is_open = False
        parent = set_span_in_context(self._span)
        for name, stage in self._stages.items():
            span = self._tracer.start_span(
                name,
                parent,
                kind=_KINDS.get(name, SpanKind.INTERNAL),
                attributes={"nanovllm.stage.seconds": stage.seconds, **((of_stages or {}).get(name) or {})},
                links=[Link(one) for one in self._joined] if name == "publish" else (),
                start_time=self._ns(stage.began),
            )
            if failure is not None and failure[0] == name:
                _fail(span, failure[1])
            span.end(self._ns(stage.ended))
        self._span.set_attributes({**(attributes or {}), **({"nanovllm.outcome": outcome} if outcome else {})})
        if failure is not None:
            _fail(self._span, failure[1])
        self._span.end(self._ns(time.monotonic()))

    def close(self, *, is_cut_short: bool) -> None:
        """End what has not ended: ``is_cut_short`` where its records go back to Kafka."""
        for one in (*self._parts, self):
            one.end("returned" if is_cut_short else None)

    def _ns(self, monotonic_s: float) -> int:
        return self._wall_ns + round(1e9 * monotonic_s)


class ReportedExporter(SpanExporter):
    """An exporter whose failures are told in one line that is always the same.

    Its own lines differ from attempt to attempt, and repeat what the receiver says.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """As the exporter's; never raises."""
        try:
            result = self._exporter.export(spans)
        except Exception as error:
            logger.warning("spans are lost: they cannot be sent to %s: %s", _receiver(), type(error).__name__)
            return SpanExportResult.FAILURE
        if result is not SpanExportResult.SUCCESS:
            logger.warning("spans are lost: %s does not take them", _receiver())
        return result

    def shutdown(self) -> None:
        """As the exporter's."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """As the exporter's."""
        return self._exporter.force_flush(timeout_millis)


def _otlp_exporter() -> OTLPSpanExporter:
    name = OTEL_EXPORTER_OTLP_TRACES_PROTOCOL
    protocol = os.environ.get(name) or os.environ.get(name := OTEL_EXPORTER_OTLP_PROTOCOL) or PROTOCOL
    if protocol != PROTOCOL:
        raise ConfigurationError(
            f"{name} is {protocol}: the worker speaks {PROTOCOL}; unset it, and name the receiver's port for that "
            f"(mostly 4318) in {OTEL_EXPORTER_OTLP_ENDPOINT}"
        )
    _check_headers()
    for name in _FILES:
        if (path := os.environ.get(name)) and not Path(path).is_file():
            raise ConfigurationError(f"{name} is {path}, which is no file: name one, or unset it")
    for name in (OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, OTEL_EXPORTER_OTLP_ENDPOINT):
        if (url := os.environ.get(name)) and not re.match("https?://[^/]", url):
            raise ConfigurationError(f"{name} is no http:// or https:// URL of a receiver, such as http://host:4318")
    return OTLPSpanExporter()


def _check_headers() -> None:
    # opentelemetry-api 1.45 logs a header that it cannot read, token and all, and goes on without it.
    logging.getLogger(parse_env_headers.__module__).disabled = True
    for name in (OTEL_EXPORTER_OTLP_TRACES_HEADERS, OTEL_EXPORTER_OTLP_HEADERS):
        for number, header in enumerate(os.environ.get(name, "").split(","), 1):
            if header.strip() and not parse_env_headers(header, liberal=True):
                raise ConfigurationError(
                    f"header {number} of {name} is not name=value: write authorization=Bearer%20…, without spaces or "
                    "commas, and one comma between two headers"
                )


def _receiver() -> str:
    """Host and port of the OTLP receiver, without what its URL may hold beside."""
    url = os.environ.get(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) or os.environ.get(OTEL_EXPORTER_OTLP_ENDPOINT)
    return urlsplit(url or "http://localhost:4318").netloc.rpartition("@")[2]


def _parent(headers: Headers) -> Context:
    sent = {
        name: [value.decode(errors="replace") for key, value in headers if key.lower() == name and value]
        for name in TRACE_HEADERS
    }
    sent = {name: [value for value in values if len(value) <= _MAX_CHARS[name]] for name, values in sent.items()}
    # Without a context of its own the span would be a child of whatever is current here.
    return _PROPAGATOR.extract(sent, Context()) if len(sent["traceparent"]) == 1 else Context()


def _fail(span: Span, code: str) -> None:
    span.set_attribute("error.type", code)
    span.set_status(Status(StatusCode.ERROR, code))
