"""The route stage of an event: which route takes its object, as which job, and until when."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from pydantic import ValidationError

from nanovllm.errors import InvalidEvent, ObjectNotFound
from nanovllm.messages.job import ImageRef
from nanovllm.messages.validation import describe_errors
from nanovllm.objects.reader import ObjectHead
from nanovllm.objects.versions import lasting_version
from nanovllm.pipeline.admission.admission import Reservation
from nanovllm.pipeline.documents.extraction import DocumentSource
from nanovllm.pipeline.events.event import ObjectEvent
from nanovllm.pipeline.failure.bucket_holds import BucketHeldError, BucketHolds, WatchedFetcher
from nanovllm.pipeline.routing.routes import Routes
from nanovllm.pipeline.stages.ask_store import AskStore
from nanovllm.pipeline.stages.context import EventSkippedError, JobContext, SkipReason
from nanovllm.settings.routes import Route


@dataclass(frozen=True)
class RoutedEvent:
    """An event of a new object and the route that takes it; ``ref`` names the object in the event's version."""

    event: ObjectEvent
    route: Route
    source: DocumentSource
    ref: ImageRef
    context: JobContext

    @property
    def delivery(self) -> str:
        """The Kafka record that it came in first, equal in its retries, and the job, for records of several events."""
        source = self.context.origin.source
        record = f"{source.topic}/{source.partition}/{source.offset}@{source.timestamp_ms}"
        return f"{record}#{self.context.job_id}"

    @property
    def ends_with(self) -> tuple[SkipReason, ...]:
        """What beside its sidecar ends it without a record.

        A replayed one whose record is there is published: the topic may have refused the record behind the sidecar.
        """
        return ("superseded",) if self.context.origin.replays else ("same", "superseded")


class RouteEvent:
    """Finds the route of an event's object, which is asked for where content type or size decide."""

    def __init__(self, routes: Routes, fetcher: WatchedFetcher, holds: BucketHolds, ask: AskStore) -> None:
        self._routes = routes
        self._fetcher = fetcher
        self._holds = holds
        self._ask = ask

    async def __call__(self, event: ObjectEvent, context: JobContext, reservation: Reservation) -> RoutedEvent:
        """The routed event, whose context has the job's id, the route's topic and its deadline.

        Raises:
            EventSkippedError: it tells of no new object, or no route takes it.
            InvalidEvent: no object can have its name, version or entity tag.
            NanoVLLMError: the store cannot be asked.
        """
        if event.kind != "created":
            raise EventSkippedError(event.kind)
        candidates = self._routes.candidates(event.bucket, event.key)
        if not candidates:
            raise EventSkippedError("no_route")
        ref = _ref(f"s3://{event.bucket}/{event.key}", lasting_version(event.version_id), event.etag)
        with context.progress.stage("admit"):
            head = await self._asked(ref, context, reservation)
        route: Route | None
        if isinstance(head, ObjectNotFound):
            route = candidates[0]  # which of them would take it is not known any more
        else:
            content_type, size = (None, event.size) if head is None else (head.content_type, head.size)
            route = self._routes.route_of(event.bucket, event.key, content_type, size)
        if route is None:
            raise EventSkippedError("no_route")
        if isinstance(head, ObjectHead) and not (ref.version_id or ref.etag):
            # The event of some stores names no content: it is what is there now.
            ref = _ref(f"s3://{event.bucket}/{event.key}", head.version_id, head.etag)
        source = DocumentSource(
            ref.uri or "", ref.version_id, ref.etag, event.sequencer, event.event_time, event.dialect
        )
        began = event.event_time or context.progress.received_at
        context = replace(
            context,
            job_id=source.job_id(route),
            expires_at=_expiry(began, route.deadline_s),
            result_topic=route.result_topic,
            subject=source.uri,
        )
        return RoutedEvent(event, route, source, ref, context)

    async def _asked(
        self, ref: ImageRef, context: JobContext, reservation: Reservation
    ) -> ObjectHead | ObjectNotFound | None:
        """What the store says of the object, where that decides; None: it need not be asked."""
        bucket, key = ref.bucket_and_key
        if (ref.version_id or ref.etag) and not self._routes.needs_head(bucket, key):
            return None
        while True:
            if self._holds.is_held(ref.address.store, context.tenant):
                with reservation.without_slot():
                    await self._holds.wait([ref.address.store], context.tenant)
            try:
                return await self._ask(ref.identity, lambda: self._fetcher.head(ref, context.tenant), context.progress)
            except ObjectNotFound as missing:
                return missing
            except BucketHeldError:
                continue


def _expiry(began: datetime, deadline_s: float | None) -> datetime | None:
    if deadline_s is None:
        return None
    try:
        return began + timedelta(seconds=deadline_s)
    except OverflowError:
        return None  # beyond the calendar


def _ref(uri: str, version_id: str | None, etag: str | None) -> ImageRef:
    try:
        return ImageRef(uri=uri, version_id=version_id, etag=etag)
    except ValidationError as error:
        raise InvalidEvent(describe_errors(error, "the event's object")) from None
