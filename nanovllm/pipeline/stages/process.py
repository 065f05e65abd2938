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
from nanovllm.pipeline.admission.admission import Ticket
from nanovllm.pipeline.admission.engine_queue import Claim, Dispatch
from nanovllm.pipeline.admission.key_order import Turn
from nanovllm.pipeline.admission.tenants import CHARS_PER_TOKEN, FairShares, TokenRates
from nanovllm.pipeline.consuming.crash_guard import InFlight
from nanovllm.pipeline.consuming.partition import Delivery
from nanovllm.pipeline.consuming.retry_topics import RetryTiers
from nanovllm.pipeline.failure.backoff import Backoff
from nanovllm.pipeline.failure.circuit_breaker import CircuitBreaker
from nanovllm.pipeline.failure.dead_letter_limit import PoisonLimit
from nanovllm.pipeline.failure.faults import SystemicFaults
from nanovllm.pipeline.stages.caches import AnswerReuse, ImageReuse
from nanovllm.pipeline.stages.context import Passage
from nanovllm.pipeline.stages.invalid_records import Refusals, Refused
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

    passage: Passage
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
        faults: SystemicFaults,
        backoff: Backoff,
        result_store: S3ResultStore | None = None,
        in_flight: InFlight | None = None,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._sees = decoders is not None
        self._fetcher = fetcher
        self._images = ImageReuse(fetcher, decoders, engine.find_image, metrics, max_bytes=settings.reuse.image_bytes)
        self._answers = AnswerReuse(engine.model_info, metrics, max_bytes=settings.reuse.answer_bytes)
        self._sink = sink
        self._result_store = result_store
        self._in_flight = in_flight
        self._metrics = metrics
        self._faults = faults
        self._backoff = backoff
        self._outgoing = OutgoingRecords(settings, engine.model_info, sink.max_record_bytes)
        self._tiers = RetryTiers.of(settings)
        self._breaker = CircuitBreaker(
            threshold=settings.retries.breaker_objects,
            waits=Backoff(settings.retries.breaker_wait_s, settings.retries.breaker_max_wait_s),
            opened=lambda error, wait_s: self._faults.report(OBJECT_STORE, error, lapse_s=wait_s),
        )
        tenants = settings.tenants
        # A few more than run at once: a place that becomes free is taken in the engine's very next step.
        places = engine.max_num_seqs + max(1, engine.max_num_seqs // 4)
        self._dispatch = Dispatch(places, FairShares(tenants.weights))
        self._rates = TokenRates(tenants.tokens_per_minute, tenants.limits)
        self._poison = PoisonLimit(settings.dead_letters.poison_limit)
        self._submitted = 0
        self.refusals = Refusals(
            self._outgoing, sink, metrics, self._poison, passage_of=self._passage_of, persist=self._persist
        )
        """Of the records that ``receive`` refused."""

    async def work(self, passage: Passage, job: Job, ticket: Ticket, turn: Turn | None) -> None:
        """One job from its receipt to its end, whatever that is; in its ``turn`` where keys are in order."""
        try:
            try:
                async with passage.deadline(passage.expires_at):
                    with passage.stage("admit"):
                        if turn is not None:
                            await turn.wait()
                        claim = self._claim(job, passage)
                        if self._rates.wait_s(claim.tenant):
                            with ticket.aside():
                                await self._rates.pass_through(claim.tenant, claim.tokens)
                        else:
                            self._rates.charge(claim.tenant, claim.tokens)
                        refs = await self._admit(job, ticket)
                    with passage.stage("fetch"):
                        reuse = job.reuse or self._settings.reuse.level
                        fetched = await self._fetch(refs, reuse != "none", ticket, passage)
                    with passage.stage("prepare"):
                        images = await self._prepare(fetched, reuse != "none", ticket, passage)
                    with passage.stage("infer"):
                        output = await self._answer(job, images, claim, reuse == "answers", passage)
                records = self._outgoing.answer(passage, job, fetched, output, self._engine.stats())
                self._poison.answered()
                with passage.stage("publish"):
                    records = await self._store_if_large(records, passage)
            except Exception as error:
                records = self._retry_later(passage, error) or self._bury(passage, error)
            await self._finish(records, passage, ticket)
        finally:
            ticket.release()

    async def _finish(self, records: list[OutgoingRecord], passage: Passage, ticket: Ticket) -> None:
        with passage.stage("publish"):
            await self._publish(records, passage, ticket)
        passage.delivery.settle()
        self._observe(passage)

    def receive(self, delivery: Delivery) -> Received | Refused:
        """Read the record. Raises SystemicError where that is no reason to bury a job."""
        began, passage = time.monotonic(), None
        try:
            if delivery.unreadable is not None:
                raise InvalidJob(f"the record cannot be read: {delivery.unreadable}")
            job = decode_job(delivery.value, max_bytes=self._settings.admission.max_job_bytes)
            passage = self._passage_of(delivery, began)
            passage.format = message_format(delivery.value)
            passage.job_id = job.job_id or passage.job_id
            passage.expires_at = self._expiry(job, passage)
            passage.tenant = self._settings.tenants.tenant_of(passage.origin.source.topic, passage.origin.headers)
            passage.result_topic = self._settings.topics.result_topic(job.reply_to)
        except Exception as error:
            verdict = self._verdict(passage, error)
            if verdict is error:
                # Told by its name and text: the frames that it was raised in need not stay until it is acknowledged.
                verdict.__traceback__ = verdict.__context__ = None
            if passage is None and isinstance(verdict, InvalidJob) and verdict.job_id is not None:
                passage = self._passage_of(delivery, began)
                passage.job_id = verdict.job_id
            return Refused(delivery, verdict, passage)
        if job.job_id is None:
            job = job.model_copy(update={"job_id": passage.job_id})
        passage.seconds["receive"] = passage.elapsed_s
        return Received(passage, job)

    def _passage_of(self, delivery: Delivery, began: float | None = None) -> Passage:
        passage = Passage(delivery, self._tiers.origin_of(delivery), began)
        source = passage.origin.source
        passage.job_id = derive_job_id(source.topic, source.partition, source.offset)
        return passage

    def _expiry(self, job: Job, passage: Passage) -> datetime | None:
        """The job's deadline, or the end of what the settings let a record live, if that is earlier."""
        ttl_s, written_ms = self._settings.admission.ttl_s, passage.origin.source.timestamp_ms
        if ttl_s is None or written_ms is None:
            return job.deadline
        try:
            end = datetime.fromtimestamp(written_ms / 1000 + ttl_s, UTC)
        except (OverflowError, ValueError, OSError):
            return job.deadline  # beyond the calendar: a producer that writes microseconds
        return end if job.deadline is None else min(end, job.deadline)

    def _claim(self, job: Job, passage: Passage) -> Claim:
        tokens = job.text_chars // CHARS_PER_TOKEN + self._sampling(job).max_tokens
        lane = self._tiers.lanes.get(passage.delivery.topic, 0)
        return Claim(tokens, job.priority, passage.tenant, passage.expires_at, lane)

    def _settle_tokens(self, claim: Claim, output: RequestOutput, passage: Passage) -> None:
        used = 0
        if passage.reused is None:
            used = output.usage.input_tokens + output.usage.output_tokens
            self._dispatch.settle(claim, used)
        self._rates.charge(claim.tenant, used - claim.tokens)

    async def _admit(self, job: Job, ticket: Ticket) -> tuple[ImageRef, ...]:
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
            await ticket.reserve(encoded + self._decoded_bytes(len(refs)))
        return refs

    def _decoded_bytes(self, images: int) -> int:
        """What ``images`` take once prepared: 8-bit RGB; those of no fixed size are charged when they are known."""
        transform = self._engine.image_transform
        if transform is None or transform.output_size is None:
            return 0
        height, width = transform.output_size
        return images * height * width * 3

    async def _fetch(
        self, refs: tuple[ImageRef, ...], may_reuse: bool, ticket: Ticket, passage: Passage
    ) -> list[FetchedImage]:
        salt = self._settings.tenants.salt_of(passage.tenant)

        def attempt(ref: ImageRef) -> Awaitable[FetchedImage]:
            fetch = partial(self._images.fetch, ref, salt, may_reuse=may_reuse)
            return self._breaker.call(ref.identity, fetch)

        max_attempts = self._settings.s3.max_attempts
        fetched = await _all(
            self._persist(partial(attempt, ref), OBJECT_STORE, passage, max_attempts=max_attempts) for ref in refs
        )
        ticket.hold(sum(len(image.data) for image in fetched) + self._decoded_bytes(len(refs)))
        return fetched

    async def _prepare(
        self, fetched: list[FetchedImage], may_reuse: bool, ticket: Ticket, passage: Passage
    ) -> tuple[PreparedImage, ...]:
        if not self._sees:
            return ()
        salt = self._settings.tenants.salt_of(passage.tenant)
        prepare = partial(self._images.prepare, salt=salt, may_reuse=may_reuse)
        images = await _all(self._persist(partial(prepare, image), "image decoders", passage) for image in fetched)
        ticket.hold(sum(image.nbytes for image in images))
        return tuple(images)

    async def _answer(
        self, job: Job, images: tuple[PreparedImage, ...], claim: Claim, may_reuse: bool, passage: Passage
    ) -> RequestOutput:
        async def infer() -> RequestOutput:
            async with self._dispatch.place(claim), self._alone_if_suspected(passage):
                return await self._infer(job, images, claim, passage)

        salt = self._settings.tenants.salt_of(passage.tenant)
        key = self._answers.key(job, images, self._sampling(job), salt) if may_reuse else None
        if key is None:
            output = await infer()
        else:
            output, reuse = await self._answers.get(key, infer)
            passage.reused = None if reuse == "miss" else reuse
        self._settle_tokens(claim, output, passage)
        return output

    async def _infer(
        self, job: Job, images: tuple[PreparedImage, ...], claim: Claim, passage: Passage
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
                priority=claim.lane + job.priority,
                cache_salt=self._settings.tenants.salt_of(passage.tenant),
            )
        )
        try:
            return await generation
        finally:
            generation.abort()

    @asynccontextmanager
    async def _alone_if_suspected(self, passage: Passage) -> AsyncIterator[None]:
        """Before the engine starts the job, it is on record; after a crash that tells whom to suspect."""
        in_flight, delivery = self._in_flight, passage.delivery
        if in_flight is None:
            yield
            return
        async with in_flight.place(delivery):
            await self._persist(lambda: in_flight.recorded(delivery), "kafka producer", passage)
            yield

    async def _store_if_large(self, records: list[OutgoingRecord], passage: Passage) -> list[OutgoingRecord]:
        """The records of an answer, the result by reference where it is too large and there is a store for it."""
        result, *others = records
        store = self._result_store
        if store is None or not self._outgoing.is_too_large(result):
            return records
        name, fmt = self._outgoing.stored_name(passage), self._outgoing.format_of(passage)
        stored = await self._persist(lambda: store.put(name, result.value, fmt), "result store", passage)
        return [self._outgoing.reference(passage, stored), *others]

    async def _publish(self, records: list[OutgoingRecord], passage: Passage, ticket: Ticket) -> None:
        """Returns when all are acknowledged: only then may the ledger move."""
        try:
            await self._send(records, passage, ticket)
        except MessageTooLarge as error:
            passage.failed_stage = "publish"
            records = self._bury(passage, error)
            await self._send(records, passage, ticket)
        for record in records:
            self._metrics.sent.labels(record.topic).inc()

    async def _send(self, records: list[OutgoingRecord], passage: Passage, ticket: Ticket) -> None:
        delivery = passage.delivery
        transactions = delivery.transactions
        if transactions is None:
            await self._persist(lambda: self._sink.publish(records), "kafka producer", passage)
            return
        self._sink.check(records)
        # It may have to wait for the jobs below it; its place is free for others meanwhile.
        ticket.leave_with(sum(record.size_bytes for record in records))
        await self._persist(lambda: transactions.release(delivery.offset, records), "kafka producer", passage)

    async def _persist(
        self, attempt: Callable[[], Awaitable[T]], part: str, passage: Passage, *, max_attempts: int | None = None
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
                passage.attempts = failures
                passage.first_failed_at = passage.first_failed_at or datetime.now(UTC)
                if isinstance(error, SystemicError) or max_attempts is None:
                    self._faults.report(part, error)
                elif failures >= max_attempts:
                    raise
                self._metrics.retries.labels(passage.current_stage).inc()
                await asyncio.sleep(self._backoff.wait_s(failures))
            else:
                self._faults.clear(part)
                return outcome

    def _retry_later(self, passage: Passage, error: Exception) -> list[OutgoingRecord]:
        """The job for a retry topic, when waiting may help it and its settings and deadline allow that."""
        reason = _first_cause(error)
        record = self._outgoing.delayed_retry(passage, reason) if isinstance(reason, TransientError) else None
        if record is None or not isinstance(reason, TransientError):
            return []
        passage.fail(reason, waits_in=record.topic)
        logger.info("job %r waits in %s: %s", passage.job_id, record.topic, reason.code)
        return [record]

    def _bury(self, passage: Passage, error: Exception) -> list[OutgoingRecord]:
        """The dead letter for what can never succeed.

        Raises:
            SystemicError: it can, once the worker is well or another one takes it: back to Kafka. Or this would be one
                dead letter too many.
        """
        reason = self._verdict(passage, error)
        self._poison.bury()
        passage.fail(reason)
        logger.warning(
            "job %r is a dead letter: %s in stage %s: %r",
            passage.job_id,
            reason.code,
            passage.failed_stage,
            str(reason),
        )
        return [self._outgoing.dead_letter(passage, reason)]

    def _verdict(self, passage: Passage | None, error: Exception) -> NanoVLLMError:
        """What the dead letter says was wrong. Raises SystemicError: that is no reason to bury a job."""
        reason = _first_cause(error)
        if isinstance(reason, SystemicError):
            raise reason
        if not isinstance(reason, NanoVLLMError):
            job_id, stage = (passage.job_id, passage.failed_stage) if passage else (None, "receive")
            logger.error("job %r failed in stage %s", job_id, stage, exc_info=reason)
            internal = NanoVLLMError(f"internal error of the worker: {type(reason).__name__}")
            internal.__cause__ = reason
            reason = internal
        return reason

    def _sampling(self, job: Job) -> SamplingParams:
        return job.sampling_params(self._settings.sampling, self._settings.admission.max_tokens)

    def _observe(self, passage: Passage) -> None:
        metrics = self._metrics
        metrics.jobs.labels(passage.outcome).inc()
        metrics.process_seconds.observe(passage.elapsed_s)
        for stage, seconds in passage.seconds.items():
            metrics.stage_seconds.labels(stage).observe(seconds)
        if passage.waited_in_kafka_s is not None:
            metrics.stage_seconds.labels("kafka").observe(passage.waited_in_kafka_s)
        if passage.failure is not None and passage.outcome == "dead_letter":
            metrics.dead_letters.labels(passage.failure_class, passage.failure.code, passage.failed_stage).inc()
        output = passage.output
        if output is None or passage.reused is not None:
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
