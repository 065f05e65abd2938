"""Runs the events of one record through their stages, one after another, to one publication of all their outcomes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from nanovllm.messages.document_record import DocumentRecord
from nanovllm.objects.reader import FetchedImage
from nanovllm.pipeline.admission.admission import Reservation
from nanovllm.pipeline.events.event import ObjectEvent
from nanovllm.pipeline.stages.admit import AdmittedJob
from nanovllm.pipeline.stages.context import EventSkippedError, Extracted, JobContext, Outcome, Skipped
from nanovllm.pipeline.stages.receive import ReceivedEvents
from nanovllm.pipeline.stages.route_event import RoutedEvent

EndedEvent = tuple[Outcome, JobContext]


@dataclass(frozen=True)
class EventStages:
    """The stages of events, as `Stages` are those of jobs.

    Those up to ``answer`` raise EventSkippedError where no record is to come. ``publish`` takes the outcomes of all
    events of a record, and returns those that the brokers acknowledged.
    """

    route: Callable[[ObjectEvent, JobContext, Reservation], Awaitable[RoutedEvent]]
    admit: Callable[[RoutedEvent, Reservation], Awaitable[AdmittedJob]]
    fetch: Callable[[RoutedEvent, AdmittedJob], Awaitable[FetchedImage]]
    extract: Callable[[RoutedEvent, FetchedImage, AdmittedJob], Awaitable[DocumentRecord]]
    answer: Callable[[RoutedEvent, DocumentRecord], Awaitable[Extracted]]
    failure: Callable[[JobContext, Exception], Awaitable[Outcome]]
    publish: Callable[[Sequence[EndedEvent], Reservation], Awaitable[Sequence[EndedEvent]]]
    observe: Callable[[Outcome, JobContext], None]


async def process_events(received: ReceivedEvents, reservation: Reservation, stages: EventStages) -> None:
    """Run the stages of each event; the record ends with their published outcomes and a complete offset.

    Raises:
        SystemicError: as `process_job`.
    """
    ended: list[EndedEvent] = []
    jobs: set[str] = set()
    for event, notification in received.events:
        context = received.context
        if len(received.events) > 1:
            # What is dead-lettered or waits for a retry is this event, not those beside it.
            alone = replace(context.record, value=notification)
            context = replace(context, record=alone, progress=replace(context.progress, seconds={}))
        ended.append(await _process_event(event, context, reservation, stages, jobs))
        reservation.give_bytes_back()
        # As bytes for Kafka, and about as much as the document's record.
        reservation.hold(2 * sum(record.size_bytes for record in ended[-1][0].records))
    published = await stages.publish(ended, reservation)
    received.context.record.complete()
    for outcome, context in published:
        stages.observe(outcome, context)


async def _process_event(
    event: ObjectEvent, context: JobContext, reservation: Reservation, stages: EventStages, jobs: set[str]
) -> EndedEvent:
    """``jobs``: the ids of those of the record so far."""
    try:
        routed = await stages.route(event, context, reservation)
        context = routed.context
        if context.job_id in jobs:
            # Its sidecar has this very record for its writer, which would publish it twice.
            raise EventSkippedError("same")
        jobs.add(context.job_id)
        async with context.deadline():
            admitted = await stages.admit(routed, reservation)
            document = await stages.fetch(routed, admitted)
            record = await stages.extract(routed, document, admitted)
        # Outside the deadline: an extracted document has a record.
        return await stages.answer(routed, record), context
    except EventSkippedError as skipped:
        return Skipped(skipped.reason), context
    except Exception as error:
        return await stages.failure(context, error), context
