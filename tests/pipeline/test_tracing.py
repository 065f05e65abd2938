"""Traces of jobs: from the producer by way of the worker to what it sends, and to a receiver of spans."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import opentelemetry.trace
import pytest
from bench import Bench, FaultyFetcher, GatedEngine, eventually, png, reached
from document_bench import Documents
from document_files import drawn, receipts_pdf, receipts_route
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from otlp_receiver import OtlpReceiver
from parts import create_topic, worker_process

from nanovllm.client.producer import JobProducer
from nanovllm.demo.child_process import free_port
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import ConfigurationError, FetchFailed, InvalidJob
from nanovllm.pipeline.build import build_tracing
from nanovllm.pipeline.consuming.retry_topics import RetryTopics
from nanovllm.pipeline.operations.tracing import FLUSH_S, Tracing
from nanovllm.settings.failures import RetrySettings
from nanovllm.settings.tracing import TracingSettings
from nanovllm.settings.worker import Settings

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01".encode()
STAGES = ["receive", "admit", "fetch", "prepare", "infer", "publish"]


class Spans:
    """The spans that a worker's tracing exported, by their trace."""

    def __init__(self, settings: Settings, **tracing: Any) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing.of(
            settings.model_copy(update={"tracing": TracingSettings(enabled=True, **tracing)}), self._exporter
        )

    async def exported(self) -> tuple[ReadableSpan, ...]:
        await self.tracing.close()
        return self._exporter.get_finished_spans()


def hex_ids(span: ReadableSpan) -> tuple[str, str, str | None]:
    """Trace id, own id, and the parent's."""
    context = span.get_span_context()
    assert context is not None
    parent = None if span.parent is None else f"{span.parent.span_id:016x}"
    return f"{context.trace_id:032x}", f"{context.span_id:016x}", parent


def named(spans: Sequence[ReadableSpan], name: str) -> ReadableSpan:
    (found,) = [span for span in spans if span.name == name]
    return found


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def links(span: ReadableSpan) -> list[str]:
    return [f"{link.context.span_id:016x}" for link in span.links]


def trace_of(record: Any) -> tuple[str, str]:
    """Trace id and span id in a record's header, of which there is one, and which says that they are sampled."""
    (sent,) = [value.decode() for name, value in record.headers if name.lower() == "traceparent"]
    version, trace_id, span_id, flags = sent.split("-")
    assert (version, int(flags, 16) & 1) == ("00", 1)
    return trace_id, span_id


@contextmanager
def service_tracing(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """A tracer provider of a service, as its set-up would make it known."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(opentelemetry.trace, "_TRACER_PROVIDER", provider)
    yield exporter
    provider.shutdown()


async def test_the_spans_of_a_job_from_its_producer_to_its_result_share_a_trace(
    bench: Bench, images: Callable[[str, bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spans, topics = Spans(bench.settings), bench.settings.topics
    with service_tracing(monkeypatch) as exporter:
        async with (
            bench.working(EchoEngine(), traces=spans.tracing),
            JobProducer(bench.settings.kafka, topic=topics.jobs) as producer,
        ):
            with opentelemetry.trace.get_tracer("service").start_as_current_span("request"):
                await producer.send("a secret word <|image|>", images=[images("a.png", png())], job_id="j")
            (result,), (metrics,) = [await bench.read(topic, 1) for topic in (topics.results, topics.metrics)]
        send, request = exporter.get_finished_spans()
    exported = await spans.exported()

    process = named(exported, f"process {topics.jobs}")
    trace_id, send_id, request_id = hex_ids(send)
    assert (hex_ids(request)[0], request_id) == (trace_id, hex_ids(request)[1])
    assert hex_ids(process)[::2] == (trace_id, send_id)
    assert trace_of(result) == trace_of(metrics) == hex_ids(process)[:2]
    stages = sorted((span for span in exported if span is not process), key=lambda span: span.start_time or 0)
    assert [span.name for span in stages] == STAGES
    assert {hex_ids(span)[::2] for span in stages} == {hex_ids(process)[:2]}
    for span in stages:
        assert (process.start_time or 0) <= (span.start_time or 0) <= (span.end_time or 0) <= (process.end_time or 0)

    assert [span.kind for span in (send, process, stages[-1])] == [
        *(SpanKind.PRODUCER, SpanKind.CONSUMER, SpanKind.PRODUCER)
    ]
    sent, received = attributes(send), attributes(process)
    assert sent["messaging.destination.name"] == received["messaging.destination.name"] == topics.jobs
    for name in ("messaging.system", "messaging.destination.partition.id", "messaging.kafka.offset"):
        assert sent[name] == received[name]
    assert received["messaging.consumer.group.name"] == bench.settings.kafka.group_id
    assert (received["nanovllm.job.id"], received["nanovllm.outcome"]) == ("j", "result")
    usage, infer = json.loads(result.value)["usage"], attributes(named(exported, "infer"))
    assert infer["gen_ai.request.model"] == "echo"
    assert infer["gen_ai.response.finish_reasons"] == ("stop",)
    assert infer["gen_ai.usage.input_tokens"] == usage["input_tokens"]
    assert infer["gen_ai.usage.output_tokens"] == usage["output_tokens"]
    assert "secret" not in "".join(span.to_json() for span in (*exported, send))
    assert "a.png" not in "".join(span.to_json() for span in (*exported, send))


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("traceparent", b"00-ab")],
        [("traceparent", b"\xff" * 55)],
        [("traceparent", b"00-" + b"0" * 32 + b"-00f067aa0ba902b7-01")],
        [("traceparent", TRACEPARENT), ("Traceparent", TRACEPARENT)],
        [("traceparent", TRACEPARENT + b"-" + b"\t" * 900), ("tracestate", b"a=b")],
    ],
)
async def test_headers_that_are_no_trace_context_begin_a_new_trace(
    bench: Bench, headers: list[tuple[str, bytes]]
) -> None:
    spans = Spans(bench.settings)
    await bench.send({"job_id": "j", "prompt": "p"}, headers=headers)
    async with bench.working(EchoEngine(), traces=spans.tracing):
        (result,) = await bench.read(bench.settings.topics.results, 1)
    process = named(await spans.exported(), f"process {bench.settings.topics.jobs}")
    trace_id, span_id, parent = hex_ids(process)
    assert parent is None
    assert trace_id != TRACE_ID
    assert trace_of(result) == (trace_id, span_id)
    assert "tracestate" not in dict(result.headers)


HEADERS = st.lists(
    st.tuples(
        st.sampled_from(["traceparent", "Traceparent", "tracestate", "other"]),
        st.binary(max_size=1_500)
        | st.from_regex(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]\n?", fullmatch=True).map(str.encode)
        | st.from_regex(r"[a-z]{1,4}=[!-~]{1,8}(,[a-z]{1,4}=[ -~]{1,8})*", fullmatch=True).map(str.encode),
    ),
    max_size=5,
)


@given(HEADERS)
def test_what_is_carried_on_is_a_trace_context_whatever_came(headers: list[tuple[str, bytes]]) -> None:
    trace = Tracing(TracerProvider(shutdown_on_exit=False), "group").begin("jobs", 0, 0, tuple(headers))
    carried = trace.carried(tuple(headers))
    parents = [value for name, value in carried if name.lower() == "traceparent"]
    states = [value for name, value in carried if name.lower() == "tracestate"]
    assert [bool(re.fullmatch(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-3]", value)) for value in parents] == [True]
    assert len(states) <= 1
    assert all(len(state) <= 512 and state.isascii() for state in states)
    assert [one for one in carried if one[0] == "other"] == [one for one in headers if one[0] == "other"]
    if not any(re.fullmatch(rb"[ \t]*[0-9a-f]{2}-[0-9a-f]{32}-.*", value, re.DOTALL) for _, value in headers):
        assert not states


async def test_the_state_of_a_trace_is_carried_on_and_its_decision_is_followed(bench: Bench) -> None:
    spans = Spans(bench.settings, sample_ratio=0)
    not_sampled = TRACEPARENT[:-1] + b"0"
    for job_id, headers in {
        "sampled": [("Traceparent", TRACEPARENT), ("tracestate", b"vendor=1")],
        "not": [("traceparent", not_sampled)],
        "none": [],
    }.items():
        await bench.send({"job_id": job_id, "prompt": "p"}, headers=headers)
    async with bench.working(EchoEngine(), traces=spans.tracing):
        results = {one.key.decode(): dict(one.headers) for one in await bench.read(bench.settings.topics.results, 3)}
    exported = await spans.exported()
    assert {attributes(span).get("nanovllm.job.id") for span in exported if span.parent and span.parent.is_remote} == {
        "sampled"
    }
    assert results["sampled"]["tracestate"] == b"vendor=1"
    assert results["sampled"]["traceparent"].startswith(b"00-" + TRACE_ID.encode())
    # What follows in the trace of others need not decide anew.
    assert results["not"]["traceparent"].startswith(b"00-" + TRACE_ID.encode())
    assert [int(results[job]["traceparent"][-2:], 16) & 1 for job in ("not", "none")] == [0, 0]


async def test_a_delayed_retry_and_its_dead_letter_stay_in_the_trace(
    bench: Bench, images: Callable[[str, bytes], str]
) -> None:
    bench.settings = bench.settings.model_copy(update={"retries": RetrySettings(delays_s=(1,))})
    (retry_topic,) = RetryTopics.of(bench.settings).delays_s
    await create_topic(bench.bootstrap_servers, retry_topic, partitions=1)
    spans = Spans(bench.settings)
    fetcher = FaultyFetcher(bench.settings, FetchFailed("the words of a store"))
    job = {"job_id": "j", "prompt": "<|image|>", "images": [images("a.png", png())]}
    await bench.send(job, headers=[("traceparent", TRACEPARENT), ("kept", b"1")])
    async with bench.working(EchoEngine(), fetcher, traces=spans.tracing):
        (letter,) = await bench.read(bench.settings.topics.dead_letters, 1)
        (waiting,) = await bench.read(retry_topic, 1)
        await eventually(lambda: bench.metrics.jobs.labels("dead_letter")._value.get() == 1)
    exported = await spans.exported()
    first, second = [named(exported, f"process {topic}") for topic in (bench.settings.topics.jobs, retry_topic)]
    assert hex_ids(first)[::2] == (TRACE_ID, PARENT_ID)
    assert trace_of(waiting) == hex_ids(first)[:2]
    assert dict(waiting.headers)["kept"] == b"1"
    assert hex_ids(second)[::2] == hex_ids(first)[:2]
    assert trace_of(letter) == hex_ids(second)[:2]
    for span, outcome in (first, "retry"), (second, "dead_letter"):
        assert attributes(span)["nanovllm.outcome"] == outcome
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, FetchFailed.code)
    failed = [span for span in exported if span.name == "fetch"]
    assert [attributes(span)["error.type"] for span in failed] == [FetchFailed.code] * 2
    assert "words" not in "".join(span.to_json() for span in exported)


async def test_invalid_records_end_their_traces_and_are_linked_where_they_were_published_together(bench: Bench) -> None:
    spans, partition = Spans(bench.settings), 1
    await bench.send(b"no job", b'{"prompt": 1}', partition=partition, headers=[("traceparent", TRACEPARENT)])
    async with bench.working(EchoEngine(), traces=spans.tracing):
        letters = await bench.read(bench.settings.topics.dead_letters, 2)
        await eventually(lambda: reached(bench, 2, partition))
    exported = await spans.exported()
    processed = [span for span in exported if span.name.startswith("process")]
    assert {hex_ids(span)[:2] for span in processed} == {trace_of(letter) for letter in letters}
    for span in processed:
        assert (span.status.description, attributes(span)["nanovllm.outcome"]) == (InvalidJob.code, "dead_letter")
    published = {hex_ids(span)[2]: links(span) for span in exported if span.name == "publish"}
    one, other = (hex_ids(span)[1] for span in processed)
    assert published in ({one: [other], other: [one]}, {one: [], other: []})  # or each in a poll of its own
    assert "no job" not in "".join(span.to_json() for span in exported)


async def test_jobs_of_one_transaction_are_linked(bench: Bench) -> None:
    spans, engine = Spans(bench.settings), GatedEngine()
    jobs = ["a", "b", "c"]
    async with bench.working(engine, traces=spans.tracing, delivery="exactly_once"):
        await bench.send(*({"job_id": job, "prompt": "p"} for job in jobs))
        await engine.submitted(*jobs)
        engine.open("b", "c")  # whose outputs wait for the first one's
        await bench.polled()
        engine.open("a")
        results = await bench.read(bench.settings.topics.results, 3)
        await eventually(lambda: bench.metrics.jobs.labels("result")._value.get() == 3)
    exported = await spans.exported()
    ids = {attributes(span)["nanovllm.job.id"]: hex_ids(span)[1] for span in exported if span.kind is SpanKind.CONSUMER}
    assert set(ids) == set(jobs)
    assert {trace_of(result)[1] for result in results} == set(ids.values())
    published = {hex_ids(span)[2]: links(span) for span in exported if span.name == "publish"}
    assert published[ids["a"]] == [ids["b"], ids["c"]]
    assert published[ids["b"]] == published[ids["c"]] == [ids["a"]]


async def test_a_job_that_goes_back_to_kafka_ends_its_spans(bench: Bench) -> None:
    spans, engine = Spans(bench.settings), GatedEngine()
    admission = bench.settings.admission.model_copy(update={"drain_timeout_s": 0.1})
    async with bench.working(engine, traces=spans.tracing, admission=admission):
        await bench.send({"job_id": "j", "prompt": "p"})
        await engine.submitted("j")
    process = named(await spans.exported(), f"process {bench.settings.topics.jobs}")
    assert attributes(process)["nanovllm.outcome"] == "returned"
    assert process.status.status_code is StatusCode.UNSET


async def test_documents_are_traced_and_counted_by_their_route(documents: Documents) -> None:
    bench = documents.bench
    spans = Spans(bench.settings)
    first, second = (documents.put(f"in/{key}.pdf", receipts_pdf([drawn(1)[0].image])) for key in "ab")
    alone = documents.put("in/c.pdf", receipts_pdf([one.image for one in drawn(2)]))
    broken, other = documents.put("in/d.pdf", b"no document"), documents.put("elsewhere", b"x")
    await documents.send({"Records": [first, second]}, {"Records": [alone]}, {"Records": [broken]}, other)
    async with documents.working(traces=spans.tracing, **documents.settings(receipts_route(documents.bucket))):
        await documents.ended(5)
        records = await bench.read(bench.settings.topics.results, 3)
    exported = await spans.exported()
    processed = [span for span in exported if span.kind is SpanKind.CONSUMER]
    assert len(processed) == 4
    assert {trace_of(record) for record in records} <= {hex_ids(span)[:2] for span in processed}
    events = [span for span in exported if span.name == "process event"]
    (of_two,) = {hex_ids(span)[2] for span in events}
    assert of_two in {hex_ids(span)[1] for span in processed}
    told = sorted(
        [attributes(span) for span in (*processed, *events) if "nanovllm.outcome" in attributes(span)],
        key=lambda one: str(one["nanovllm.outcome"]),
    )
    assert [one["nanovllm.outcome"] for one in told] == ["dead_letter", "result", "result", "result", "skipped"]
    assert {one.get("nanovllm.route") for one in told[:4]} == {"receipts"}
    assert told[4]["nanovllm.skipped"] == "no_route"
    inferred = [attributes(span) for span in exported if span.name == "infer" and "nanovllm.pages" in attributes(span)]
    assert sorted(one["nanovllm.pages"] for one in inferred) == [1, 1, 2]
    assert all(one["gen_ai.usage.output_tokens"] > 0 for one in inferred)
    assert ".pdf" not in "".join(span.to_json() for span in exported)

    value = bench.metrics.registry.get_sample_value
    assert value("nanovllm_documents_total", {"route": "receipts", "outcome": "result"}) == 3
    assert value("nanovllm_documents_total", {"route": "receipts", "outcome": "dead_letter"}) == 1
    assert value("nanovllm_document_infer_seconds_total", {"route": "receipts"})
    pages = {"status": "ok", "source": "model", "route": "receipts"}
    assert value("nanovllm_document_pages_total", pages) == 4


async def test_a_worker_process_exports_its_spans_by_otlp(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with OtlpReceiver.serving() as receiver, service_tracing(monkeypatch) as exporter:
        topics = bench.settings.topics
        settings = bench.environment | {
            "NANOVLLM_ENGINE__BACKEND": "echo",
            "NANOVLLM_KAFKA__GROUP_ID": bench.settings.kafka.group_id,
            "NANOVLLM_WORKER_ID": "w-1",
            "NANOVLLM_TRACING__ENABLED": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
        }
        async with JobProducer(bench.settings.kafka, topic=topics.jobs) as producer:
            await producer.send("p", job_id="j")
        worker = worker_process(tmp_path, "--exit-when-drained", settings=settings)
        worker.start()
        try:
            await eventually(lambda: not worker.is_running, timeout_s=60)
        finally:
            worker.kill()
        assert worker.exit_code == 0, worker.tail(30)
        (result,) = await bench.read(topics.results, 1)
        (send,) = exporter.get_finished_spans()
        spans = {span.name: span for _, span in receiver.spans}
        process = spans.pop(f"process {topics.jobs}")
    assert {span.trace_id.hex() for span in (process, *spans.values())} == {hex_ids(send)[0]}
    assert process.parent_span_id.hex() == hex_ids(send)[1]
    assert trace_of(result) == (process.trace_id.hex(), process.span_id.hex())
    assert set(spans) == set(STAGES) - {"fetch"}  # it has no images
    assert {span.parent_span_id for span in spans.values()} == {process.span_id}
    resource = {one.key: one.value.string_value for one in receiver.spans[0][0].attributes}
    assert (resource["service.name"], resource["service.instance.id"]) == ("nanovllm-worker", "w-1")
    assert resource["deployment.environment.name"] == "test"


class DeafReceiver(SpanExporter):
    """Takes spans, and does not answer before ``released``."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.asked = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.asked += 1
        self.released.wait()
        return SpanExportResult.FAILURE


async def test_a_receiver_that_is_not_there_costs_warnings_and_no_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://user:word@127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    tracing = build_tracing(bench.settings.model_copy(update={"tracing": TracingSettings(enabled=True)}))
    assert tracing is not None
    with caplog.at_level(logging.WARNING, "nanovllm"):
        async with bench.working(EchoEngine(), traces=tracing):
            await bench.send(*({"job_id": f"j-{number}", "prompt": "p"} for number in range(20)))
            assert len(await bench.results(20)) == 20
            await eventually(lambda: "spans are lost" in caplog.text)
        await tracing.close()
    assert "word" not in caplog.text


async def test_a_receiver_that_never_answers_does_not_hold_up_the_end(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = DeafReceiver()
    tracing = Tracing.of(bench.settings, receiver)
    async with bench.working(EchoEngine(), traces=tracing):
        await bench.send({"job_id": "j", "prompt": "p"})
        assert len(await bench.results(1)) == 1
    async with asyncio.timeout(10 * FLUSH_S):
        await tracing.close()
    assert receiver.asked == 1
    assert "the last spans are lost" in caplog.text
    receiver.released.set()


async def test_without_tracing_headers_pass_as_they_are(bench: Bench) -> None:
    headers = [("traceparent", b"00-ab"), ("tracestate", b"\xff")]
    await bench.send({"job_id": "j", "prompt": "p"}, headers=headers)
    async with bench.working(EchoEngine()):
        (result,) = await bench.read(bench.settings.topics.results, 1)
    assert [one for one in result.headers if one[0].startswith("trace")] == headers


SENDS = """
import asyncio, sys
import nanovllm.pipeline.build, nanovllm.pipeline.app
from nanovllm.client.send_span import send_span
from nanovllm.settings.worker import Settings
assert nanovllm.pipeline.build.build_tracing(Settings()) is None
with send_span("jobs") as span:
    assert span.headers == ()
    span.sent(0, 0)
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


def test_nothing_imports_opentelemetry_where_traces_are_off(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SENDS], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_what_is_missing_or_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.model_construct(tracing=TracingSettings(enabled=True))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigurationError, match=r"OTEL_EXPORTER_OTLP_PROTOCOL is grpc.*http/protobuf"):
        build_tracing(settings)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "0")
    with pytest.raises(ConfigurationError, match=r"OTEL_.*max_queue_size"):
        build_tracing(settings)
    monkeypatch.delitem(sys.modules, "nanovllm.pipeline.operations.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(ConfigurationError, match=r"needs opentelemetry.* pip install '\.\[otel\]'"):
        build_tracing(settings)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "hunter2:4318", "is no http:// or https:// URL"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/no/such/file", "is /no/such/file, which is no file"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=a b,Authorization: Bearer hunter2", "header 2 of"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "hunter2", "header 1 of"),
    ],
)
def test_a_variable_that_would_lose_the_spans_is_refused_without_its_secrets(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=said) as refused:
        build_tracing(Settings.model_construct(tracing=TracingSettings(enabled=True)))
    assert name in str(refused.value)
    assert "hunter2" not in str(refused.value) + caplog.text


async def test_a_send_that_fails_has_the_errors_code_and_not_its_text(
    embedded_broker: str, unique: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = unique("jobs")
    await create_topic(embedded_broker, topic, partitions=1)
    with service_tracing(monkeypatch) as exporter:
        async with JobProducer(bootstrap_servers=embedded_broker, topic=topic) as producer:
            with pytest.raises(Exception, match="bytes") as raised:
                await producer.send("<|image|>", images=[bytes(3_000_000)])
        (send,) = exporter.get_finished_spans()
    assert (send.status.status_code, send.status.description) == (StatusCode.ERROR, raised.value.code)  # type: ignore[attr-defined]
    assert not send.events
