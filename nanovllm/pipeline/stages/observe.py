"""The metrics of an outcome, and the sign of life that an answer is."""

from __future__ import annotations

from nanovllm.engine.outputs import RequestOutput
from nanovllm.metrics import Metrics
from nanovllm.pipeline.operations.health import Health
from nanovllm.pipeline.operations.recent_jobs import EndedJob, RecentJobs
from nanovllm.pipeline.stages.context import (
    Answered,
    DeadLettered,
    Extracted,
    JobContext,
    Outcome,
    Retried,
    Skipped,
    dead_letter_class,
)


def observe(metrics: Metrics, health: Health, recent: RecentJobs, outcome: Outcome, context: JobContext) -> None:
    """Count ``outcome``, observe its times, keep it among the recent ones, and tell ``health`` of an answer."""
    if isinstance(outcome, (Answered, Extracted)):
        health.answer()
    metrics.jobs.labels(outcome.label).inc()
    observe_stages(metrics, context)
    recent.add(_ended(outcome, context))
    if isinstance(outcome, DeadLettered):
        error, stage = outcome.error, context.progress.failed_stage
        metrics.dead_letters.labels(dead_letter_class(error), error.code, stage).inc()
    elif isinstance(outcome, Answered) and outcome.reused is None:
        observe_inference(metrics, outcome.output)


def observe_event(metrics: Metrics, health: Health, recent: RecentJobs, outcome: Outcome, context: JobContext) -> None:
    """As ``observe``, for one event of a record: what is skipped is counted by its reason, and is no job."""
    if isinstance(outcome, Skipped):
        metrics.events.labels(outcome.reason).inc()
        return
    metrics.events.labels(outcome.label).inc()
    observe(metrics, health, recent, outcome, context)
    route = metrics.route(context.route)
    metrics.documents.labels(route, outcome.label).inc()
    metrics.document_infer_seconds.labels(route).inc(context.progress.seconds.get("infer", 0.0))
    if isinstance(outcome, Extracted):
        for page in outcome.record.pages:
            source = "reused" if page.reused else page.source or "none"
            metrics.pages.labels(page.status, source, route).inc()
        metrics.engine_seconds_saved.labels(route).inc(outcome.record.timings_ms.saved / 1000)


def _ended(outcome: Outcome, context: JobContext) -> EndedJob:
    route, tokens = context.route or context.origin.source.topic, (0, 0)
    if isinstance(outcome, Extracted):
        tokens = outcome.record.usage.input_tokens, outcome.record.usage.output_tokens
    elif isinstance(outcome, Answered) and outcome.reused is None:
        tokens = outcome.output.usage.input_tokens, outcome.output.usage.output_tokens
    code = outcome.error.code if isinstance(outcome, (DeadLettered, Retried)) else None
    progress = context.progress
    return EndedJob(
        context.job_id, context.tenant, route, outcome.label, code, progress.seconds, progress.elapsed_s, *tokens
    )


def observe_inference(metrics: Metrics, output: RequestOutput) -> None:
    """Observe the times and tokens of a finished request."""
    timings = output.timings
    metrics.request_success.labels(output.finish_reason).inc()
    metrics.time_to_first_token.observe(timings.time_to_first_token_ms / 1000)
    metrics.request_queue_time.observe(timings.queue_ms / 1000)
    metrics.e2e_request_latency.observe(timings.e2e_ms / 1000)
    if output.usage.output_tokens > 1:
        metrics.inter_token_latency.observe(timings.mean_itl_ms / 1000)
    metrics.request_prompt_tokens.observe(output.usage.input_tokens)
    metrics.request_generation_tokens.observe(output.usage.output_tokens)
    for image in output.images:
        metrics.images.labels(image.outcome).inc()


def observe_stages(metrics: Metrics, context: JobContext) -> None:
    """Observe the seconds of each stage, of the wait in Kafka, and of the whole."""
    metrics.process_seconds.observe(context.progress.elapsed_s)
    for stage, seconds in context.progress.seconds.items():
        metrics.stage_seconds.labels(stage).observe(seconds)
    if (waited_s := context.waited_in_kafka_s) is not None:
        metrics.stage_seconds.labels("kafka").observe(waited_s)
