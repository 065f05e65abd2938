"""What the spans of a job say of its outcome: counts, codes and names; never its texts, its objects or its metadata."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nanovllm.pipeline.stages.context import Answered, DeadLettered, Extracted, JobContext, Outcome, Retried, Skipped

if TYPE_CHECKING:
    from nanovllm.messages.dead_letter import Stage
    from nanovllm.pipeline.operations.tracing import Attributes

Observe = Callable[[Outcome, JobContext], None]


class TraceOutcome:
    """Ends the spans of a job when its outcome is observed; ``model``: the name of the engine's."""

    def __init__(self, observe: Observe, model: str) -> None:
        self._observe = observe
        self._model = model

    def __call__(self, outcome: Outcome, context: JobContext) -> None:
        """As ``observe``."""
        self._observe(outcome, context)
        if (trace := context.progress.trace) is None:
            return
        attributes = job_attributes(context)
        failure = None
        if isinstance(outcome, (Retried, DeadLettered)):
            failure = context.progress.failed_stage, outcome.error.code
        elif isinstance(outcome, Skipped):
            attributes = {**attributes, "nanovllm.skipped": outcome.reason}
        of_stages: dict[Stage, Attributes] = {"publish": _publication(outcome)}
        if isinstance(outcome, (Answered, Extracted)):
            of_stages["infer"] = {
                "gen_ai.operation.name": "generate_content",
                "gen_ai.provider.name": "nanovllm",
                "gen_ai.request.model": self._model,
                **(_answer(outcome) if isinstance(outcome, Answered) else _document(outcome)),
            }
        trace.end(outcome.label, attributes, of_stages, failure)


def job_attributes(context: JobContext) -> Attributes:
    """What is known of a job whatever became of it."""
    attributes: dict[str, str | int | float] = {
        "nanovllm.job.id": context.job_id,
        "nanovllm.attempts": context.total_attempts,
        "messaging.message.body.size": len(context.record.value),
    }
    if context.tenant:
        attributes["nanovllm.tenant"] = context.tenant
    if context.route:
        attributes["nanovllm.route"] = context.route
    if (waited_s := context.waited_in_kafka_s) is not None:
        attributes["nanovllm.kafka.seconds"] = waited_s
    return attributes


def _publication(outcome: Outcome) -> Attributes:
    attributes: dict[str, str | int] = {
        "messaging.system": "kafka",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.batch.message_count": len(outcome.records),
    }
    if outcome.records:
        attributes["messaging.destination.name"] = outcome.records[0].topic
    return attributes


def _answer(outcome: Answered) -> Attributes:
    output, timings = outcome.output, outcome.output.timings
    attributes: dict[str, str | int | float | list[str]] = {
        "gen_ai.response.finish_reasons": [one.finish_reason for one in output.outputs],
        "gen_ai.usage.input_tokens": output.usage.input_tokens,
        "gen_ai.usage.output_tokens": output.usage.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": output.usage.cached_tokens,
        "nanovllm.images": len(output.images),
        "nanovllm.images.encoded": sum(image.outcome == "miss" for image in output.images),
    }
    if outcome.reused is not None:
        return {**attributes, "nanovllm.reused": outcome.reused}
    # As vLLM names them.
    return {
        **attributes,
        "gen_ai.latency.time_in_queue": timings.queue_ms / 1000,
        "gen_ai.latency.time_to_first_token": timings.time_to_first_token_ms / 1000,
    }


def _document(outcome: Extracted) -> Attributes:
    record = outcome.record
    return {
        "gen_ai.response.finish_reasons": sorted({page.stop for page in record.pages if page.stop is not None}),
        "gen_ai.usage.input_tokens": record.usage.input_tokens,
        "gen_ai.usage.output_tokens": record.usage.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.usage.cached_tokens,
        "nanovllm.pages": len(record.pages),
        "nanovllm.pages.reused": sum(page.reused for page in record.pages),
        "nanovllm.status": record.status,
    }
