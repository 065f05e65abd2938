"""Runs one job through its stages, from its admission to its published outcome."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from nanovllm.messages.job import Job
from nanovllm.objects.reader import FetchedImage
from nanovllm.pipeline.admission.admission import Reservation
from nanovllm.pipeline.consuming.partition import ConsumedRecord
from nanovllm.pipeline.stages.admit import AdmittedJob
from nanovllm.pipeline.stages.context import Inference, JobContext, Outcome
from nanovllm.pipeline.stages.image_errors import naming_image
from nanovllm.pipeline.stages.infer import Infer, request_of
from nanovllm.pipeline.stages.invalid_records import InvalidRecord, InvalidRecords
from nanovllm.pipeline.stages.receive import Received, ReceivedEvents
from nanovllm.vision.images.preprocess import PreparedImage


@dataclass(frozen=True)
class Stages:
    """The stages of a job, each a callable that `nanovllm.pipeline.build` makes; the first two take records.

    ``failure`` raises SystemicError where the record's offset must stay uncommitted. ``publish`` returns the outcome
    that the brokers acknowledged.
    """

    receive: Callable[[ConsumedRecord], Awaitable[Received | ReceivedEvents | InvalidRecord]]
    invalid_records: InvalidRecords
    admit: Callable[[Job, JobContext, Reservation], Awaitable[AdmittedJob]]
    fetch: Callable[[AdmittedJob], Awaitable[list[FetchedImage]]]
    prepare: Callable[[Sequence[FetchedImage], AdmittedJob], Awaitable[tuple[PreparedImage, ...]]]
    infer: Infer
    answer: Callable[[Job, JobContext, Sequence[FetchedImage], Inference], Awaitable[Outcome]]
    failure: Callable[[JobContext, Exception], Awaitable[Outcome]]
    publish: Callable[[Outcome, JobContext, Reservation], Awaitable[Outcome]]
    observe: Callable[[Outcome, JobContext], None]


async def process_job(job: Job, context: JobContext, reservation: Reservation, stages: Stages) -> None:
    """Run the stages; the record ends with one published outcome and a complete offset.

    Raises:
        SystemicError: nothing can succeed on this worker now, or one dead letter too many in a row. The offset stays
            uncommitted, and the worker ends.
    """
    try:
        async with context.deadline():
            admitted = await stages.admit(job, context, reservation)
            with naming_image(admitted.refs):
                fetched = await stages.fetch(admitted)
                images = await stages.prepare(fetched, admitted)
            inference = await stages.infer(request_of(job, images, admitted), admitted)
        # Outside the deadline: an inferred job is answered.
        outcome = await stages.answer(job, context, fetched, inference)
    except Exception as error:
        outcome = await stages.failure(context, error)
    outcome = await stages.publish(outcome, context, reservation)
    context.record.complete()
    stages.observe(outcome, context)
