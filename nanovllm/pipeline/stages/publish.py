"""The last stages: the records of an answer, and their publication."""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.engine.backends.base import EngineBackend
from nanovllm.errors import MessageTooLarge
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.messages.job import Job
from nanovllm.messages.result import Result
from nanovllm.metrics import Metrics
from nanovllm.objects.reader import FetchedImage
from nanovllm.pipeline.admission.admission import Reservation
from nanovllm.pipeline.stages.context import Answered, DeadLettered, Inference, JobContext, Outcome
from nanovllm.pipeline.stages.failure import DeadLetterLimit, Failure
from nanovllm.pipeline.stages.record_builder import RecordBuilder
from nanovllm.pipeline.stages.retry import Retry
from nanovllm.sinks.base import Sink
from nanovllm.sinks.claim_check import S3ResultStore
from nanovllm.sinks.kafka import Unsent


class Answer:
    """Builds the result and the metrics of an answered job."""

    def __init__(self, builder: RecordBuilder, engine: EngineBackend, limit: DeadLetterLimit) -> None:
        self._builder = builder
        self._engine = engine
        self._limit = limit

    async def __call__(
        self, job: Job, context: JobContext, fetched: Sequence[FetchedImage], inference: Inference
    ) -> Answered:
        """The answered outcome."""
        result, metrics = self._builder.answer(context, job, fetched, inference, self._engine.stats)
        self._limit.reset()
        record = await self._result_record(result, context)
        return Answered((record, metrics), inference.output, inference.reused)

    async def _result_record(self, result: Result, context: JobContext) -> OutgoingRecord:
        return self._builder.result(context, result)


class AnswerByClaimCheck(Answer):
    """As ``Answer``; a result above its topic's limit, or ``s3.large_result_bytes``, goes to S3 and is referred to."""

    def __init__(
        self, builder: RecordBuilder, engine: EngineBackend, limit: DeadLetterLimit, store: S3ResultStore, retry: Retry
    ) -> None:
        super().__init__(builder, engine, limit)
        self._store = store
        self._retry = retry

    async def _result_record(self, result: Result, context: JobContext) -> OutgoingRecord:
        builder, store = self._builder, self._store
        record = builder.result(context, result)
        if not await builder.is_too_large(record):
            return record
        name, fmt = builder.stored_name(context), builder.format_of(context)
        with context.progress.stage("publish"):
            stored = await self._retry(
                lambda: store.put(name, record.value or b"", fmt), "result store", context.progress
            )
        return builder.result(context, result.referring_to(stored))


class Publish:
    """Publishes outcomes; an offset may be committed after that, and not before."""

    def __init__(self, sink: Sink, retry: Retry, failure: Failure, metrics: Metrics) -> None:
        self._sink = sink
        self._retry = retry
        self._failure = failure
        self._metrics = metrics

    async def __call__(self, outcome: Outcome, context: JobContext, reservation: Reservation) -> Outcome:
        """Return the outcome that the brokers acknowledged: ``outcome``, or a dead letter where it was too large.

        Raises:
            SystemicError: one dead letter too many.
        """
        return (await self.together([(outcome, context)], reservation))[0][0]

    async def together(
        self, ended: Sequence[tuple[Outcome, JobContext]], reservation: Reservation
    ) -> list[tuple[Outcome, JobContext]]:
        """As the call, for all outcomes of one record, each with the context of its own; there is at least one."""
        outcomes = list(ended)
        context = outcomes[0][1]
        with context.progress.stage("publish"):
            while True:
                records = [record for outcome, _ in outcomes for record in outcome.records]
                try:
                    await self._send(records, context, reservation)
                    break
                except MessageTooLarge as error:
                    await self._replace_largest(outcomes, error)
        for record in records:
            self._metrics.sent.labels(record.topic).inc()
        return outcomes

    async def _replace_largest(self, outcomes: list[tuple[Outcome, JobContext]], error: MessageTooLarge) -> None:
        """Make a dead letter of the largest outcome that is none."""
        sizes = {
            number: sum(record.size_bytes for record in outcome.records)
            for number, (outcome, _) in enumerate(outcomes)
            if not isinstance(outcome, DeadLettered)
        }
        if not any(sizes.values()):
            raise error
        largest = max(sizes, key=sizes.__getitem__)
        context = outcomes[largest][1]
        context.progress.failed_stage = "publish"
        outcomes[largest] = (await self._failure.dead_letter(context, error), context)

    async def _send(self, records: Sequence[OutgoingRecord], context: JobContext, reservation: Reservation) -> None:
        record, transactions = context.record, context.record.transactions
        await self._sink.check(records)
        if transactions is None and not records:
            return
        if transactions is None:
            await self._retry(Unsent(self._sink, records), self._sink.part, context.progress)
            return
        # It may wait for the transactions of lower offsets: others may have its slot meanwhile. Outputs above its
        # offset wait for this one, also where it has no records.
        reservation.release_slot(sum(one.size_bytes for one in records))
        await self._retry(lambda: transactions.release({record.offset: records}), "kafka producer", context.progress)
