"""The answer stage of an event: the record's sidecar, its Kafka record, and that of its metrics."""

from __future__ import annotations

from nanovllm.kafka.records import OutgoingRecord
from nanovllm.messages.base import FinishReason
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.messages.job_metrics import JobMetrics
from nanovllm.pipeline.documents.sidecars import Sidecars
from nanovllm.pipeline.stages.ask_store import AskStore
from nanovllm.pipeline.stages.context import EventSkippedError, Extracted, JobContext
from nanovllm.pipeline.stages.failure import DeadLetterLimit
from nanovllm.pipeline.stages.record_builder import RecordBuilder
from nanovllm.pipeline.stages.retry import Retry
from nanovllm.pipeline.stages.route_event import RoutedEvent
from nanovllm.settings.routes import Route
from nanovllm.sinks.base import Sink
from nanovllm.sinks.claim_check import S3ResultStore
from nanovllm.sinks.cloud_events import event_record


class AnswerDocument:
    """Writes the sidecars of records, and builds what is published of them.

    The sidecar comes first, and nothing behind it can fail for the document's sake. Its writer publishes the record:
    other deliveries of the version find it and are skipped, and the writer's own goes on after a kill.
    """

    def __init__(
        self,
        builder: RecordBuilder,
        sink: Sink,
        sidecars: Sidecars,
        large_results: S3ResultStore | None,
        limit: DeadLetterLimit,
        ask: AskStore,
        retry: Retry,
    ) -> None:
        self._builder = builder
        self._sink = sink
        self._sidecars = sidecars
        self._large_results = large_results
        self._limit = limit
        self._ask = ask
        self._retry = retry

    async def __call__(self, routed: RoutedEvent, record: DocumentRecord) -> Extracted:
        """The outcome with its records.

        Raises:
            EventSkippedError: another delivery has written this version's sidecar meanwhile, or a newer one's is there.
            MessageTooLarge: the topic does not take the record, and there is no place for large results.
            SidecarTaken, NanoVLLMError: as `Sidecars.put`.
        """
        context = routed.context
        with context.progress.stage("publish"):
            published = await self._document_record(routed.route, record, context)
            records = (published, self._metrics(record, context))
            await self._sink.check(records)
            outcome = await self._ask(
                routed.source.uri,
                lambda: self._sidecars.put(record, routed.source, routed.route, delivery=routed.delivery),
                context.progress,
            )
        if outcome in routed.ends_with:
            raise EventSkippedError(outcome)
        self._limit.reset()
        return Extracted(records, record)

    async def _document_record(self, route: Route, record: DocumentRecord, context: JobContext) -> OutgoingRecord:
        builder, store = self._builder, self._large_results
        topic = topic_of(route, record) or builder.settings.topics.results
        fmt, headers = builder.format_of(context), context.origin.headers
        published = event_record(record, topic, fmt, headers)
        if store is None or not await builder.is_too_large(published):
            return published
        name, value = builder.stored_name(context), published.value or b""
        stored = await self._retry(lambda: store.put(name, value, fmt), "result store", context.progress)
        return event_record(record.referring_to(stored), topic, fmt, headers)

    def _metrics(self, record: DocumentRecord, context: JobContext) -> OutgoingRecord:
        builder = self._builder
        metrics = document_metrics(record, context.progress.elapsed_s)
        return event_record(
            metrics, builder.settings.topics.metrics, builder.format_of(context), context.origin.headers
        )


def topic_of(route: Route, record: DocumentRecord) -> str | None:
    """The topic that the route wants ``record`` in: its review topic where someone must see it.

    That is what is invalid or incomplete after all attempts where the route does not accept that, and a value that
    stands in text that addresses a model alone.
    """
    is_cut = any(page.stop not in (None, "stop") for page in record.pages)
    must_be_seen = (
        (record.status == "invalid" and not is_cut and route.on_invalid != "accept")
        or (is_cut and route.on_incomplete != "accept")
        or any(field.suspicious_text for field in record.fields.values())
    )
    return route.review_topic if must_be_seen and route.review_topic else route.result_topic


def document_metrics(record: DocumentRecord, elapsed_s: float) -> JobMetrics:
    """The figures of a document: those of its pages together. Raises ValueError where no Kafka record asked for it."""
    if record.source is None:
        raise ValueError("the record of a document without a Kafka record has no metrics message")
    times, usage = record.timings_ms, record.usage
    finish_reason: FinishReason = next((page.stop for page in record.pages if page.stop not in (None, "stop")), "stop")
    generation_s = times.generation / 1000
    return JobMetrics(
        job_id=record.job_id,
        result_id=record.result_id,
        worker=record.worker,
        model=record.model.id,
        source=record.source,
        finish_reason=finish_reason,
        num_prompt_tokens=usage.input_tokens,
        num_generation_tokens=usage.output_tokens,
        num_cached_tokens=usage.cached_tokens,
        num_image_tokens=usage.image_tokens,
        queue_time_ms=round(times.queue, 3),
        generation_time_ms=round(times.generation, 3),
        e2e_time_ms=round(1000 * elapsed_s, 3),
        tokens_per_second=round(usage.output_tokens / generation_s, 3) if generation_s > 0 else 0.0,
        fetch_time_ms=round(times.fetch, 3),
        prepare_time_ms=round(times.render, 3),
        encode_time_ms=round(times.encode, 3),
        engine_seconds_spent=round(max(0.0, times.generation - times.queue) / 1000, 6),
        engine_seconds_saved=round(times.saved / 1000, 6),
    )
