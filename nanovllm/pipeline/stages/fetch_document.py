"""The fetch stage of an event: the document in the version that the event names, where its record is still to come."""

from __future__ import annotations

from datetime import datetime

from nanovllm.engine.outputs import ModelInfo
from nanovllm.errors import ObjectChanged, ObjectMissing, ObjectNotFound
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.objects.reader import FetchedImage
from nanovllm.pipeline.documents.sidecars import Sidecars
from nanovllm.pipeline.stages.admit import AdmittedJob
from nanovllm.pipeline.stages.ask_store import AskStore
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
        fetcher: ObjectFetcher,
        sidecars: Sidecars,
        model: ModelInfo,
        ask: AskStore,
        retry: Retry,
        *,
        max_attempts: int,
    ) -> None:
        """``max_attempts`` at a missing object that its route waits for."""
        self._fetch = fetch
        self._fetcher = fetcher
        self._sidecars = sidecars
        self._model = model
        self._ask = ask
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
            # Before its sidecar is asked for, whose key is made of the object's.
            self._fetcher.check(routed.ref)
            beside = await self._ask(
                routed.source.uri,
                lambda: self._sidecars.beside(routed.source, route, self._model, delivery=routed.delivery),
                progress,
            )
        if beside in routed.ends_with:
            raise EventSkippedError(beside)
        try:
            document = await self._document(routed, admitted)
        except ObjectNotFound:
            if route.on_missing == "drop":
                raise EventSkippedError("missing") from None
            raise
        if is_sidecar(document.metadata):
            raise EventSkippedError("sidecar")
        return document

    async def _document(self, routed: RoutedEvent, admitted: AdmittedJob) -> FetchedImage:
        if routed.route.on_missing != "retry":
            return await self._read(routed, admitted)

        async def read() -> FetchedImage:
            try:
                return await self._read(routed, admitted)
            except ObjectNotFound as error:
                raise ObjectMissing(str(error)) from error

        return await self._retry(read, OBJECT_STORE, admitted.context.progress, max_attempts=self._max_attempts)

    async def _read(self, routed: RoutedEvent, admitted: AdmittedJob) -> FetchedImage:
        try:
            return (await self._fetch(admitted))[0]
        except ExceptionGroup as group:
            error = first_cause(group)
        admitted.reservation.give_bytes_back()
        if isinstance(error, ObjectChanged):
            progress = admitted.context.progress
            now = await self._ask(routed.source.uri, lambda: self._fetcher.head(routed.ref), progress)
            if _may_be_after(now.last_modified, routed.event.event_time):
                # The event of what is there now is under way, or has come.
                raise EventSkippedError("source_changed") from None
        raise error


def _may_be_after(written: datetime | None, event: datetime | None) -> bool:
    """Whether an object of that age may have been written after the event: ``written`` has whole seconds."""
    return written is not None and event is not None and written >= event.replace(microsecond=0)
