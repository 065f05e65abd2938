"""The records of an outcome: result and metrics, dead letter, or the job for a retry topic."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property, partial

from nanovllm.engine.outputs import Completion, ModelInfo, RequestOutput
from nanovllm.engine.outputs import TokenLogprobs as EngineLogprobs
from nanovllm.errors import NanoVLLMError, SystemicError
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.encoding import MessageFormat
from nanovllm.messages.job import Job, derive_job_id
from nanovllm.messages.job_metrics import ImageMetrics, JobMetrics
from nanovllm.messages.result import (
    InputUse,
    ModelUse,
    Output,
    Result,
    TokenLogprob,
    TokenLogprobs,
    result_id_for,
)
from nanovllm.objects.reader import FetchedImage
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.consuming.retry_topics import RetryTopics
from nanovllm.pipeline.stages.context import Inference, JobContext, dead_letter_class
from nanovllm.settings.worker import Settings
from nanovllm.sinks.cloud_events import event_record
from nanovllm.sinks.dead_letter_record import dead_letter_like, dead_letter_record, envelope_alone
from nanovllm.statistics import EngineStats

logger = logging.getLogger(__name__)

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,248}")


@dataclass(eq=False)
class RecordBuilder:
    """Builds the records of one worker. ``max_record_bytes``: see ``Sink``."""

    settings: Settings
    model: ModelInfo
    max_record_bytes: Callable[[str, int], Awaitable[int]]
    retry_topics: RetryTopics

    @cached_property
    def _model_use(self) -> ModelUse:
        return ModelUse(**asdict(self.model))

    def answer(
        self,
        context: JobContext,
        job: Job,
        fetched: Sequence[FetchedImage],
        inference: Inference,
        stats: Callable[[], EngineStats],
    ) -> tuple[Result, OutgoingRecord]:
        """The result of an answered job, and the record of its metrics; ``stats`` are the engine's now."""
        output = inference.output
        job_id = job.job_id or ""
        fields = {
            "job_id": job_id,
            "result_id": result_id_for(job_id),
            "status": "ok" if all(one.finish_reason == "stop" for one in output.outputs) else "incomplete",
            "text": output.text,
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
            "logprobs": _logprobs(output.logprobs),
            "prompt_logprobs": _logprobs(output.prompt_logprobs),
            "outputs": tuple(map(_output, output.outputs)) if len(output.outputs) > 1 else None,
            "constrained": output.is_constrained if job.sampling and job.asks_for_constraint else None,
            "reused": inference.reused,
            "usage": output.usage,
            "model": self._model_use,
            "inputs": tuple(
                InputUse(
                    uri=image.uri,
                    version_id=image.version_id,
                    name=ref.name,
                    sha256=image.sha256,
                    width=use.width,
                    height=use.height,
                    cache=use.outcome,
                )
                for ref, image, use in zip(job.image_refs() if fetched else (), fetched, output.images, strict=True)
            ),
            "timings_ms": _timings(context, output),
            "source": context.origin.source,
            "worker": self.settings.worker_id,
            "metadata": job.metadata,
        }
        result = Result.model_validate(fields)  # with its parts in one call
        metrics = _metrics(result, fetched, output, stats)
        record = event_record(metrics, self.settings.topics.metrics, self.format_of(context), context.origin.headers)
        return result, record

    def result(self, context: JobContext, result: Result) -> OutgoingRecord:
        """The record of ``result``, for the topic that the job names or the settings."""
        topic = context.result_topic or self.settings.topics.results
        return event_record(result, topic, self.format_of(context), context.origin.headers)

    async def is_too_large(self, record: OutgoingRecord) -> bool:
        """Whether a result must lie in S3, by the settings or by what its topic takes."""
        limit = await self.max_record_bytes(record.topic, record.size_bytes)
        return record.size_bytes > min(limit, self.settings.s3.large_result_bytes or limit)

    def stored_name(self, context: JobContext) -> str:
        """The name of the job's result in S3: the same for each delivery of a record, also from a retry topic.

        No two records share one. The digest tells apart what has the same tenant, topic, partition and offset: other
        groups, other clusters, a topic that was created again.
        """
        source, tenant = context.origin.source, context.tenant
        value = hashlib.sha256(context.record.value).hexdigest()
        identity = [self.settings.kafka.group_id, tenant, source.topic, source.partition, source.offset]
        digest = hashlib.sha256(json.dumps([*identity, source.timestamp_ms, value]).encode()).hexdigest()
        return f"{_folder(tenant)}/{_folder(source.topic)}/{source.partition}/{source.offset}-{digest}"

    async def dead_letter(self, context: JobContext, error: NanoVLLMError) -> tuple[OutgoingRecord, NanoVLLMError]:
        """The original record with the reason why it failed, and that reason.

        Where it cannot be built, for whatever reason, its envelope alone, and a reason of code ``internal``.
        """
        try:
            return await self._dead_letter(context, error), error
        except SystemicError:
            raise
        except Exception as fault:
            source, record = context.origin.source, context.record
            where = f"{source.topic}-{source.partition} offset {source.offset}"
            logger.exception("the dead letter of %s cannot be built (%s): its envelope is sent", where, error.code)
            message = f"the dead letter of {error.code} could not be built: {type(fault).__name__}"
            alone = envelope_alone(
                self.settings.topics.dead_letters,
                source,
                record.original_value,
                # A replay takes the value from its source: without the header it would be another tenant's job.
                self.settings.tenants.header_of(record.headers),
                job_id=context.job_id,
                stage=context.progress.failed_stage,
                message=message,
                worker=self.settings.worker_id,
            )
            return alone, NanoVLLMError(message)

    async def _dead_letter(self, context: JobContext, error: NanoVLLMError) -> OutgoingRecord:
        record, progress = context.record, context.progress
        letter = DeadLetter(
            job_id=context.job_id,
            code=error.code,
            error_class=dead_letter_class(error),
            stage=progress.failed_stage,
            message=str(error),
            retryable=error.retryable,
            cause=root_cause(error),
            attempts=context.total_attempts,
            replays=context.origin.replays or None,
            source=context.origin.source,
            worker=self.settings.worker_id,
            received_at=progress.received_at,
            first_failed_at=progress.first_failed_at,
            failed_at=datetime.now(UTC),
        )
        topic = self.settings.topics.dead_letters
        build = partial(
            dead_letter_record,
            letter,
            topic,
            key=record.key,
            value=record.original_value,
            original_headers=context.origin.headers,
            keep_headers=self.settings.dead_letters.keep_headers,
            tenant=self.settings.tenants.header_of(context.origin.headers),
        )
        whole = build(max_bytes=sys.maxsize)
        limit = await self.max_record_bytes(topic, whole.size_bytes)
        return whole if whole.size_bytes <= limit else build(max_bytes=limit)

    async def another_dead_letter(self, consumed: ConsumedRecord, like: OutgoingRecord) -> OutgoingRecord | None:
        """A dead letter that differs from ``like``, of the same partition, in its source alone.

        None where it must be made by itself: the record is from a retry topic, or too large as it is.
        """
        if consumed.topic in self.retry_topics.delays_s:
            return None
        source: dict[str, str | int | None] = {
            "job_id": derive_job_id(consumed.topic, consumed.partition, consumed.offset),
            "source_offset": consumed.offset,
            "source_timestamp_ms": consumed.timestamp_ms,
        }
        try:
            record = dead_letter_like(like, source, key=consumed.key, value=consumed.original_value)
            return record if record and await self._fits(record) else None
        except SystemicError:
            raise
        except Exception:
            return None

    async def delayed_retry(self, context: JobContext, error: NanoVLLMError) -> OutgoingRecord | None:
        """The original record for the retry topic that comes next, if there is one that takes it in time."""
        topic = self.retry_topics.topic_after(context.record.topic, before=context.expires_at)
        if topic is None:
            return None
        failed_at = context.progress.first_failed_at or datetime.now(UTC)
        headers = context.origin.retry_headers(context.total_attempts, failed_at, error)
        record = OutgoingRecord(topic, context.record.key, context.record.value, headers)
        return record if await self._fits(record) else None

    async def _fits(self, record: OutgoingRecord) -> bool:
        return record.size_bytes <= await self.max_record_bytes(record.topic, record.size_bytes)

    def format_of(self, context: JobContext) -> MessageFormat:
        """The format of what is sent for ``context``."""
        wanted = self.settings.result_format
        return context.format if wanted == "as_job" else wanted


def _timings(context: JobContext, output: RequestOutput) -> dict[str, float]:
    """The fields of the result's ``timings_ms``."""
    seconds, timings = context.progress.seconds, output.timings
    milliseconds = {
        "admit": 1000 * (seconds.get("receive", 0.0) + seconds.get("admit", 0.0)),
        "fetch": 1000 * seconds.get("fetch", 0.0),
        "prepare": 1000 * seconds.get("prepare", 0.0),
        "queue": timings.queue_ms,
        "encode": timings.encode_ms,
        "time_to_first_token": timings.time_to_first_token_ms,
        "generation": timings.generation_ms,
        "total": 1000 * context.progress.elapsed_s,
    }
    return {name: round(value, 3) if value else 0.0 for name, value in milliseconds.items()}


def _metrics(
    result: Result, fetched: Sequence[FetchedImage], output: RequestOutput, engine_stats: Callable[[], EngineStats]
) -> JobMetrics:
    ours, timings, usage = result.timings_ms, output.timings, output.usage
    generation_s = timings.generation_ms / 1000
    # The first token belongs to the prefill; what generation_ms covers are the ones after it.
    after_first = max(0, usage.output_tokens - 1)
    spared = sum(image.outcome != "miss" for image in output.images) if output.images else 0
    spared_s = 0.0
    if spared and (stats := engine_stats()).encoder_images:
        spared_s = spared * (stats.encoder_seconds / stats.encoder_images)
    return JobMetrics(
        job_id=result.job_id,
        result_id=result.result_id,
        worker=result.worker,
        model=result.model.id,
        source=result.source,
        finish_reason=output.finish_reason,
        reused=result.reused,
        num_prompt_tokens=usage.input_tokens,
        num_generation_tokens=usage.output_tokens,
        num_cached_tokens=usage.cached_tokens,
        num_image_tokens=usage.image_tokens,
        queue_time_ms=ours.queue,
        time_to_first_token_ms=ours.time_to_first_token,
        generation_time_ms=ours.generation,
        mean_itl_ms=round(timings.mean_itl_ms, 3),
        e2e_time_ms=ours.total,
        tokens_per_second=round(after_first / generation_s, 3) if generation_s > 0 else 0.0,
        fetch_time_ms=ours.fetch,
        prepare_time_ms=ours.prepare,
        encode_time_ms=ours.encode,
        engine_seconds_spent=round(max(0.0, timings.e2e_ms - timings.queue_ms) / 1000, 6),
        engine_seconds_saved=round(spared_s, 6),
        images=tuple(
            ImageMetrics(sha256=image.sha256, cache=use.outcome, tokens=use.tokens)
            for image, use in zip(fetched, output.images, strict=True)
        ),
    )


def root_cause(failure: NanoVLLMError) -> str:
    """The innermost error's name; for a fault of the worker itself, also where in this package it was raised.

    Never its text: it may hold what the job said, an address or a path.
    """
    error: BaseException = failure
    causes = {id(error)}
    while error.__cause__ is not None and id(error.__cause__) not in causes:
        error = error.__cause__
        causes.add(id(error))
    name = type(error).__name__
    if failure.code != NanoVLLMError.code:
        return name
    frames = [
        f"{module}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if (module := frame.f_globals.get("__name__", "")).startswith("nanovllm.")
    ]
    return f"{name} in {frames[-1]}" if frames else name


def _folder(name: str) -> str:
    """A segment of a key for each name, and for no other: the name where it is plain, or its digest."""
    if not name or _PLAIN_NAME.fullmatch(name):
        return name or "-"
    return "~" + hashlib.sha256(name.encode()).hexdigest()


def _output(completion: Completion) -> Output:
    return Output(**{**completion, "logprobs": _logprobs(completion.logprobs)})


def _logprobs(positions: Sequence[EngineLogprobs] | None) -> tuple[TokenLogprobs, ...] | None:
    if positions is None:
        return None
    return tuple(
        tuple(TokenLogprob(token_id=token, **score) for token, score in position.items()) for position in positions
    )
