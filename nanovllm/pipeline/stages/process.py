"""The way of a job: receive → admit → fetch → prepare → infer → publish → settle."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from nanovllm.engine.backends.base import EngineBackend, Request
from nanovllm.engine.outputs import RequestOutput
from nanovllm.errors import InvalidInput, InvalidJob, MessageTooLarge, NanoVLLMError, SystemicError, TransientError
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.messages.codec import decode_job, message_format
from nanovllm.messages.job import ImageRef, Job, derive_job_id
from nanovllm.metrics import Metrics
from nanovllm.objects.fetch import FetchedImage, ObjectFetcher
from nanovllm.pipeline.admission.admission import Reservation
from nanovllm.pipeline.admission.engine_queue import EngineQueue, QueuedJob
from nanovllm.pipeline.admission.key_order import KeyTurn
from nanovllm.pipeline.admission.tenants import CHARS_PER_TOKEN, FairShares, TokenRates
from nanovllm.pipeline.consuming.crash_guard import CrashGuard
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.consuming.retry_topics import RetryTopics
from nanovllm.pipeline.failure.backoff import Backoff
from nanovllm.pipeline.failure.circuit_breaker import CircuitBreaker
from nanovllm.pipeline.failure.dead_letter_limit import DeadLetterLimit
from nanovllm.pipeline.failure.faults import ActiveFaults
from nanovllm.pipeline.stages.caches import ImageCache, ResponseCache
from nanovllm.pipeline.stages.context import JobContext
from nanovllm.pipeline.stages.invalid_records import InvalidRecord, InvalidRecords
from nanovllm.pipeline.stages.publish import OutgoingRecords
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings.worker import Settings
from nanovllm.sinks.claim_check import S3ResultStore
from nanovllm.sinks.kafka import KafkaSink
from nanovllm.vision.images.pool import DecoderPool
from nanovllm.vision.images.preprocess import PreparedImage

logger = logging.getLogger(__name__)

T = TypeVar("T")

OBJECT_STORE = "object store"


@dataclass(frozen=True)
class Received:
    """A job, and its way through the stages, which has begun."""

    context: JobContext
    job: Job


class Stages:
    """What happens to a job, stage by stage; each delivery ends here, in exactly one way.

    Args:
        faults: told of what concerns more than one job; while any is present the worker takes no work.
        backoff: between two attempts at what may succeed later.
        result_store: for results too large for their topic.
        in_flight: the record of what the engine is about to start.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        engine: EngineBackend,
        decoders: DecoderPool | None,
        fetcher: ObjectFetcher,
        sink: KafkaSink,
        metrics: Metrics,
        faults: ActiveFaults,
        backoff: Backoff,
        result_store: S3ResultStore | None = None,
        in_flight: CrashGuard | None = None,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._sees = decoders is not None
        self._fetcher = fetcher
        self._images = ImageCache(fetcher, decoders, engine.find_image, metrics, max_bytes=settings.reuse.image_bytes)
        self._answers = ResponseCache(engine.model_info, metrics, max_bytes=settings.reuse.answer_bytes)
        self._sink = sink
        self._result_store = result_store
        self._in_flight = in_flight
        self._metrics = metrics
        self._faults = faults
        self._backoff = backoff
        self._outgoing = OutgoingRecords(settings, engine.model_info, sink.max_record_bytes)
        self._retry_topics = RetryTopics.of(settings)
        self._breaker = CircuitBreaker(
            threshold=settings.retries.breaker_objects,
            waits=Backoff(settings.retries.breaker_wait_s, settings.retries.breaker_max_wait_s),
            opened=lambda error, wait_s: self._faults.report(OBJECT_STORE, error, lapse_s=wait_s),
        )
        tenants = settings.tenants
        # A few more than run at once: a place that becomes free is taken in the engine's very next step.
        places = engine.max_num_seqs + max(1, engine.max_num_seqs // 4)
        self._engine_queue = EngineQueue(places, FairShares(tenants.weights))
        self._rates = TokenRates(tenants.tokens_per_minute, tenants.limits)
        self._dead_letter_limit = DeadLetterLimit(settings.dead_letters.poison_limit)
        self._submitted = 0
        self.refusals = InvalidRecords(
            self._outgoing, sink, metrics, self._dead_letter_limit, context_of=self._context_of, persist=self._persist
        )
        """Of the records that ``receive`` refused."""

    async def work(self, context: JobContext, job: Job, reservation: Reservation, turn: KeyTurn | None) -> None:
        """One job from its receipt to its end, whatever that is; in its ``turn`` where keys are in order."""
        try:
            try:
                async with context.deadline(context.expires_at):
                    with context.stage("admit"):
                        if turn is not None:
                            await turn.wait()
                        queued = self._queued_job(job, context)
                        if self._rates.wait_s(queued.tenant):
                            with reservation.without_slot():
                                await self._rates.pass_through(queued.tenant, queued.tokens)
                        else:
                            self._rates.charge(queued.tenant, queued.tokens)
                        refs = await self._admit(job, reservation)
                    with context.stage("fetch"):
                        reuse = job.reuse or self._settings.reuse.level
                        fetched = await self._fetch(refs, reuse != "none", reservation, context)
                    with context.stage("prepare"):
                        images = await self._prepare(fetched, reuse != "none", reservation, context)
                    with context.stage("infer"):
                        output = await self._answer(job, images, queued, reuse == "answers", context)
                records = self._outgoing.answer(context, job, fetched, output, self._engine.stats())
                self._dead_letter_limit.answered()
                with context.stage("publish"):
                    records = await self._store_if_large(records, context)
            except Exception as error:
                records = self._retry_later(context, error) or self._bury(context, error)
            await self._finish(records, context, reservation)
        finally:
            reservation.release()

    async def _finish(self, records: list[OutgoingRecord], context: JobContext, reservation: Reservation) -> None:
        with context.stage("publish"):
            await self._publish(records, context, reservation)
        context.delivery.settle()
        self._observe(context)

    def receive(self, delivery: ConsumedRecord) -> Received | InvalidRecord:
        """Read the record. Raises SystemicError where that is no reason to bury a job."""
        began, context = time.monotonic(), None
        try:
            if delivery.unreadable is not None:
                raise InvalidJob(f"the record cannot be read: {delivery.unreadable}")
            job = decode_job(delivery.value, max_bytes=self._settings.admission.max_job_bytes)
            context = self._context_of(delivery, began)
            context.format = message_format(delivery.value)
            context.job_id = job.job_id or context.job_id
            context.expires_at = self._expiry(job, context)
            context.tenant = self._settings.tenants.tenant_of(context.origin.source.topic, context.origin.headers)
            context.result_topic = self._settings.topics.result_topic(job.reply_to)
        except Exception as error:
            verdict = self._verdict(context, error)
            if verdict is error:
                # Told by its name and text: the frames that it was raised in need not stay until it is acknowledged.
                verdict.__traceback__ = verdict.__context__ = None
            if context is None and isinstance(verdict, InvalidJob) and verdict.job_id is not None:
                context = self._context_of(delivery, began)
                context.job_id = verdict.job_id
            return InvalidRecord(delivery, verdict, context)
        if job.job_id is None:
            job = job.model_copy(update={"job_id": context.job_id})
        context.seconds["receive"] = context.elapsed_s
        return Received(context, job)

    def _context_of(self, delivery: ConsumedRecord, began: float | None = None) -> JobContext:
        context = JobContext(delivery, self._retry_topics.origin_of(delivery), began)
        source = context.origin.source
        context.job_id = derive_job_id(source.topic, source.partition, source.offset)
        return context

    def _expiry(self, job: Job, context: JobContext) -> datetime | None:
        """The job's deadline, or the end of what the settings let a record live, if that is earlier."""
        ttl_s, written_ms = self._settings.admission.ttl_s, context.origin.source.timestamp_ms
        if ttl_s is None or written_ms is None:
            return job.deadline
        try:
            end = datetime.fromtimestamp(written_ms / 1000 + ttl_s, UTC)
        except (OverflowError, ValueError, OSError):
            return job.deadline  # beyond the calendar: a producer that writes microseconds
        return end if job.deadline is None else min(end, job.deadline)

    def _queued_job(self, job: Job, context: JobContext) -> QueuedJob:
        tokens = job.text_chars // CHARS_PER_TOKEN + self._sampling(job).max_tokens
        lane = self._retry_topics.lanes.get(context.delivery.topic, 0)
        return QueuedJob(tokens, job.priority, context.tenant, context.expires_at, lane)

    def _settle_tokens(self, queued: QueuedJob, output: RequestOutput, context: JobContext) -> None:
        used = 0
        if context.reused is None:
            used = output.usage.input_tokens + output.usage.output_tokens
            self._engine_queue.settle(queued, used)
        self._rates.charge(queued.tenant, used - queued.tokens)

    async def _admit(self, job: Job, reservation: Reservation) -> tuple[ImageRef, ...]:
        """Refuse what can be refused before a byte is read, and wait for room for the rest."""
        refs = job.image_refs()
        if refs and not self._sees:
            raise InvalidInput(f"the model {self._engine.model_info.id} takes no images")
        if len(refs) > self._settings.engine.max_images_per_request:
            raise InvalidInput(
                f"the job has {len(refs)} images, above the limit of {self._settings.engine.max_images_per_request}"
            )
        self._sampling(job)
        for ref in refs:
            self._fetcher.check(ref)
        if refs:
            # The sizes of objects are not known yet; what is too much is given back as soon as they are.
            encoded = sum(self._settings.images.max_bytes if ref.data is None else len(ref.data) for ref in refs)
            await reservation.acquire_bytes(encoded + self._decoded_bytes(len(refs)))
        return refs

    def _decoded_bytes(self, images: int) -> int:
        """What ``images`` take once prepared: 8-bit RGB; those of no fixed size are charged when they are known."""
        transform = self._engine.image_transform
        if transform is None or transform.output_size is None:
            return 0
        height, width = transform.output_size
        return images * height * width * 3

    async def _fetch(
        self, refs: tuple[ImageRef, ...], may_reuse: bool, reservation: Reservation, context: JobContext
    ) -> list[FetchedImage]:
        salt = self._settings.tenants.salt_of(context.tenant)

        def attempt(ref: ImageRef) -> Awaitable[FetchedImage]:
            fetch = partial(self._images.fetch, ref, salt, may_reuse=may_reuse)
            return self._breaker.call(ref.identity, fetch)

        max_attempts = self._settings.s3.max_attempts
        fetched = await _all(
            self._persist(partial(attempt, ref), OBJECT_STORE, context, max_attempts=max_attempts) for ref in refs
        )
        reservation.resize(sum(len(image.data) for image in fetched) + self._decoded_bytes(len(refs)))
        return fetched

    async def _prepare(
        self, fetched: list[FetchedImage], may_reuse: bool, reservation: Reservation, context: JobContext
    ) -> tuple[PreparedImage, ...]:
        if not self._sees:
            return ()
        salt = self._settings.tenants.salt_of(context.tenant)
        prepare = partial(self._images.prepare, salt=salt, may_reuse=may_reuse)
        images = await _all(self._persist(partial(prepare, image), "image decoders", context) for image in fetched)
        reservation.resize(sum(image.nbytes for image in images))
        return tuple(images)

    async def _answer(
        self, job: Job, images: tuple[PreparedImage, ...], queued: QueuedJob, may_reuse: bool, context: JobContext
    ) -> RequestOutput:
        async def infer() -> RequestOutput:
            async with self._engine_queue.slot(queued), self._alone_if_suspected(context):
                return await self._infer(job, images, queued, context)

        salt = self._settings.tenants.salt_of(context.tenant)
        key = self._answers.key(job, images, self._sampling(job), salt) if may_reuse else None
        if key is None:
            output = await infer()
        else:
            output, reuse = await self._answers.get(key, infer)
            context.reused = None if reuse == "miss" else reuse
        self._settle_tokens(queued, output, context)
        return output

    async def _infer(
        self, job: Job, images: tuple[PreparedImage, ...], queued: QueuedJob, context: JobContext
    ) -> RequestOutput:
        self._submitted += 1
        generation = self._engine.submit(
            Request(
                # The same job may be at work twice, delivered again or sent again: the number keeps the two apart.
                request_id=f"{job.job_id}#{self._submitted}",
                prompt=job.prompt,
                messages=job.message_dicts(),
                images=images,
                sampling=self._sampling(job),
                priority=queued.lane + job.priority,
                cache_salt=self._settings.tenants.salt_of(context.tenant),
            )
        )
        try:
            return await generation
        finally:
            generation.abort()

    @asynccontextmanager
    async def _alone_if_suspected(self, context: JobContext) -> AsyncIterator[None]:
        """Before the engine starts the job, it is on record; after a crash that tells whom to suspect."""
        in_flight, delivery = self._in_flight, context.delivery
        if in_flight is None:
            yield
            return
        async with in_flight.place(delivery):
            await self._persist(lambda: in_flight.recorded(delivery), "kafka producer", context)
            yield

    async def _store_if_large(self, records: list[OutgoingRecord], context: JobContext) -> list[OutgoingRecord]:
        """The records of an answer, the result by reference where it is too large and there is a store for it."""
        result, *others = records
        store = self._result_store
        if store is None or not self._outgoing.is_too_large(result):
            return records
        name, fmt = self._outgoing.stored_name(context), self._outgoing.format_of(context)
        stored = await self._persist(lambda: store.put(name, result.value, fmt), "result store", context)
        return [self._outgoing.reference(context, stored), *others]

    async def _publish(self, records: list[OutgoingRecord], context: JobContext, reservation: Reservation) -> None:
        """Returns when all are acknowledged: only then may the ledger move."""
        try:
            await self._send(records, context, reservation)
        except MessageTooLarge as error:
            context.failed_stage = "publish"
            records = self._bury(context, error)
            await self._send(records, context, reservation)
        for record in records:
            self._metrics.sent.labels(record.topic).inc()

    async def _send(self, records: list[OutgoingRecord], context: JobContext, reservation: Reservation) -> None:
        delivery = context.delivery
        transactions = delivery.transactions
        if transactions is None:
            await self._persist(lambda: self._sink.publish(records), "kafka producer", context)
            return
        self._sink.check(records)
        # It may have to wait for the jobs below it; its place is free for others meanwhile.
        reservation.release_slot(sum(record.size_bytes for record in records))
        await self._persist(lambda: transactions.release(delivery.offset, records), "kafka producer", context)

    async def _persist(
        self, attempt: Callable[[], Awaitable[T]], part: str, context: JobContext, *, max_attempts: int | None = None
    ) -> T:
        """Repeat what may succeed later.

        ``max_attempts`` bounds what is the job's own bad luck. Without it, and while nothing at all can succeed, it
        goes on for ever, and the worker takes no work until it has succeeded.
        """
        failures = 0
        while True:
            try:
                outcome = await attempt()
            except (TransientError, SystemicError) as error:
                failures += 1
                context.attempts = failures
                context.first_failed_at = context.first_failed_at or datetime.now(UTC)
                if isinstance(error, SystemicError) or max_attempts is None:
                    self._faults.report(part, error)
                elif failures >= max_attempts:
                    raise
                self._metrics.retries.labels(context.current_stage).inc()
                await asyncio.sleep(self._backoff.wait_s(failures))
            else:
                self._faults.clear(part)
                return outcome

    def _retry_later(self, context: JobContext, error: Exception) -> list[OutgoingRecord]:
        """The job for a retry topic, when waiting may help it and its settings and deadline allow that."""
        reason = _first_cause(error)
        record = self._outgoing.delayed_retry(context, reason) if isinstance(reason, TransientError) else None
        if record is None or not isinstance(reason, TransientError):
            return []
        context.fail(reason, waits_in=record.topic)
        logger.info("job %r waits in %s: %s", context.job_id, record.topic, reason.code)
        return [record]

    def _bury(self, context: JobContext, error: Exception) -> list[OutgoingRecord]:
        """The dead letter for what can never succeed.

        Raises:
            SystemicError: it can, once the worker is well or another one takes it: back to Kafka. Or this would be one
                dead letter too many.
        """
        reason = self._verdict(context, error)
        self._dead_letter_limit.bury()
        context.fail(reason)
        logger.warning(
            "job %r is a dead letter: %s in stage %s: %r",
            context.job_id,
            reason.code,
            context.failed_stage,
            str(reason),
        )
        return [self._outgoing.dead_letter(context, reason)]

    def _verdict(self, context: JobContext | None, error: Exception) -> NanoVLLMError:
        """What the dead letter says was wrong. Raises SystemicError: that is no reason to bury a job."""
        reason = _first_cause(error)
        if isinstance(reason, SystemicError):
            raise reason
        if not isinstance(reason, NanoVLLMError):
            job_id, stage = (context.job_id, context.failed_stage) if context else (None, "receive")
            logger.error("job %r failed in stage %s", job_id, stage, exc_info=reason)
            internal = NanoVLLMError(f"internal error of the worker: {type(reason).__name__}")
            internal.__cause__ = reason
            reason = internal
        return reason

    def _sampling(self, job: Job) -> SamplingParams:
        return job.sampling_params(self._settings.sampling, self._settings.admission.max_tokens)

    def _observe(self, context: JobContext) -> None:
        metrics = self._metrics
        metrics.jobs.labels(context.outcome).inc()
        metrics.process_seconds.observe(context.elapsed_s)
        for stage, seconds in context.seconds.items():
            metrics.stage_seconds.labels(stage).observe(seconds)
        if context.waited_in_kafka_s is not None:
            metrics.stage_seconds.labels("kafka").observe(context.waited_in_kafka_s)
        if context.failure is not None and context.outcome == "dead_letter":
            metrics.dead_letters.labels(context.failure_class, context.failure.code, context.failed_stage).inc()
        output = context.output
        if output is None or context.reused is not None:
            return
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


async def _all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What they return, in order; the first failure ends the others."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
    return [task.result() for task in tasks]


def _first_cause(error: Exception) -> Exception:
    """What failed first, out of the groups that a TaskGroup makes of it; an error that is systemic before others."""
    if not isinstance(error, ExceptionGroup):
        return error
    causes = [_first_cause(cause) for cause in error.exceptions]
    return next((cause for cause in causes if isinstance(cause, SystemicError)), causes[0])
