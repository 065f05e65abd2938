"""The fetch stage of an event: the document in the version that the event names, where its record is still to come."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime

from nanovllm.engine.outputs import ModelInfo
from nanovllm.errors import ObjectChanged, ObjectMissing, ObjectNotFound
from nanovllm.messages.job import ImageRef
from nanovllm.objects.fetch import FetchedImage, ObjectHead
from nanovllm.pipeline.documents.sidecars import Sidecars
from nanovllm.pipeline.stages.admit import AdmittedJob
from nanovllm.pipeline.stages.context import EventSkippedError
from nanovllm.pipeline.stages.failure import first_cause
from nanovllm.pipeline.stages.fetch import OBJECT_STORE, Fetch
from nanovllm.pipeline.stages.retry import Retry
from nanovllm.pipeline.stages.route_event import RoutedEvent
from nanovllm.sinks.sidecar import is_sidecar


class FetchDocument:
    """Fetches the documents of events through ``fetch``, which knows connections, bytes, breaker and holds."""

    def __init__(
        self,
        fetch: Fetch,
        head: Callable[[ImageRef], Awaitable[ObjectHead]],
        sidecars: Sidecars,
        model: ModelInfo,
        retry: Retry,
        *,
        max_attempts: int,
    ) -> None:
        self._fetch = fetch
        self._head = head
        self._sidecars = sidecars
        self._model = model
        self._retry = retry
        self._max_attempts = max_attempts

    async def __call__(self, routed: RoutedEvent, admitted: AdmittedJob) -> FetchedImage:
        """The document.

        Raises:
            EventSkippedError: its record is there, or that of a newer version; it is a record itself; the object has
                changed since the event; or it is gone, and the route drops such events.
            NanoVLLMError: the object cannot be had.
        """
        route, progress = routed.route, admitted.context.progress
        with progress.stage("fetch"):
            beside = await self._retry(
                lambda: self._sidecars.beside(routed.source, route, self._model, delivery=routed.delivery),
                OBJECT_STORE,
                progress,
                max_attempts=self._max_attempts,
            )
        if beside in ("same", "superseded"):
            raise EventSkippedError(beside)
        try:
            # With on_missing: retry an object that is missing is asked for as often as one that cannot be had.
            document = await self._retry(
                lambda: self._read(routed, admitted), OBJECT_STORE, progress, max_attempts=self._max_attempts
            )
        except ObjectNotFound:
            if route.on_missing == "drop":
                raise EventSkippedError("missing") from None
            raise
        if is_sidecar(document.metadata):
            raise EventSkippedError("sidecar")
        return document

    async def _read(self, routed: RoutedEvent, admitted: AdmittedJob) -> FetchedImage:
        try:
            return (await self._fetch(admitted))[0]
        except ExceptionGroup as group:
            error = first_cause(group)
        if isinstance(error, ObjectNotFound) and routed.route.on_missing == "retry":
            admitted.reservation.give_bytes_back()
            raise ObjectMissing(str(error)) from error
        if isinstance(error, ObjectChanged):
            now = await self._head(routed.ref)
            if _may_be_after(now.last_modified, routed.event.event_time):
                # The event of what is there now is under way, or has come.
                raise EventSkippedError("source_changed") from None
        raise error


def _may_be_after(written: datetime | None, event: datetime | None) -> bool:
    """Whether an object of that age may have been written after the event: ``written`` has whole seconds."""
    return written is not None and event is not None and written >= event.replace(microsecond=0)
