"""Reconciliation of objects with their sidecars: which objects have no record of what they are now."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Any, Literal
from urllib.parse import quote_plus

from nanovllm.errors import InvalidInput
from nanovllm.kafka.records import OutgoingRecord
from nanovllm.messages.s3_uri import split_object_uri, split_s3_uri
from nanovllm.objects.listing import ListedObject
from nanovllm.objects.s3_client import S3Client
from nanovllm.sinks.sidecar import SidecarMetadata, SourceVersion, head_or_none, is_sidecar, sidecar_uri

State = Literal["complete", "missing", "outdated", "other_route", "taken", "no_place", "gone", "sidecar", "not_taken"]
"""What is known of an object.

``missing``: it has no record; ``outdated``: its record is of another version; ``other_route``: of another route digest;
``taken``: another object lies where its record would go; ``no_place``: no key would be short enough; ``gone``: it was
deleted after it was listed; ``sidecar``: it is itself a record; ``not_taken``: no record of it is asked for.
"""
Takes = Callable[[str, str, str | None, int | None], bool]
"""Whether a record of an object is asked for, by its bucket, key, content type and size."""
UNFINISHED: frozenset[State] = frozenset({"missing", "outdated", "other_route", "taken", "no_place"})
SUBMITTED: frozenset[State] = frozenset({"missing", "outdated", "other_route"})
"""What a new event leads to a record of."""
WINDOW_OBJECTS = 256
MAX_REQUESTS = 16


@dataclass(frozen=True)
class Unfinished:
    """An object without a record of what it is now."""

    object: ListedObject
    state: State


@dataclass
class Tally:
    """Objects by their state."""

    complete: int = 0
    missing: int = 0
    outdated: int = 0
    other_route: int = 0
    taken: int = 0
    no_place: int = 0
    gone: int = 0
    sidecar: int = 0
    not_taken: int = 0

    def count(self, state: State) -> None:
        """Add one object."""
        setattr(self, state, getattr(self, state) + 1)

    @property
    def is_complete(self) -> bool:
        """Whether every object has its record."""
        return not any(getattr(self, state) for state in UNFINISHED)

    @property
    def has_compared(self) -> bool:
        """Whether there was an object of which a record is asked for."""
        return sum(self.as_dict().values()) > self.not_taken

    def as_dict(self) -> dict[str, int]:
        """Numbers by state."""
        return asdict(self)


class Reconciler:
    """Asks for the sidecar of each object; ``template`` says where it lies (``sidecar_uri``).

    A record that was made by another route than ``route_digest`` does not count; None: all do. An object without a
    record needs none where ``takes`` says no. ``tally`` counts what was looked at. Memory holds one window of objects,
    however many there are.
    """

    def __init__(
        self,
        client: S3Client,
        template: str,
        *,
        route_digest: str | None = None,
        takes: Takes | None = None,
        window_objects: int = WINDOW_OBJECTS,
    ) -> None:
        place, _, behind = template.partition("{key}")
        if "{key}" not in template or "{key}" in behind or split_s3_uri(place.replace("{bucket}", "bucket")) is None:
            raise InvalidInput(f"{template} is no place of sidecars such as s3://records/{{bucket}}/{{key}}.json")
        self._client = client
        self._template = template
        self._route_digest = route_digest
        self._takes = takes
        self._window_objects = window_objects
        self.tally = Tally()

    def unfinished(self, objects: Iterable[ListedObject]) -> Iterator[Unfinished]:
        """Those of ``objects`` without a record, in their order.

        Raises:
            NanoVLLMError: as ``S3Client.call``.
        """
        left = iter(objects)
        with ThreadPoolExecutor(MAX_REQUESTS) as pool:
            while window := list(islice(left, self._window_objects)):
                for found in pool.map(self._look_at, window):
                    self.tally.count(found.state)
                    if found.state in UNFINISHED:
                        yield found

    def _look_at(self, one: ListedObject) -> Unfinished:
        return self._client.call(partial(self._state_of, one))

    def _state_of(self, one: ListedObject, client: Any) -> Unfinished:
        parts = split_object_uri(one.uri)
        if parts is None:
            raise InvalidInput(f"{one.uri} is not the URI of an object")
        bucket, key = parts
        if self._may_be_sidecar(bucket, key):
            itself = head_or_none(client, bucket, key)
            if itself is None or is_sidecar(itself.get("Metadata", {})):
                return Unfinished(one, "gone" if itself is None else "sidecar")
        try:
            place = split_object_uri(sidecar_uri(self._template, bucket, key))
        except InvalidInput:
            place = None
        answer = None if place is None else head_or_none(client, *place)
        record = None if answer is None else SidecarMetadata.of(answer.get("Metadata", {}), bucket, key)
        if self._state_beside(record, SourceVersion(bucket, key, etag=one.etag)) == "complete":
            return Unfinished(one, "complete")
        # The object itself, because a list tells what was: it may have been replaced or deleted since.
        current = head_or_none(client, bucket, key)
        if current is None:
            return Unfinished(one, "gone")
        etag = current["ETag"].strip('"')
        now = ListedObject(one.uri, etag, current["ContentLength"], current.get("LastModified"))
        if self._takes is not None and not self._takes(bucket, key, current.get("ContentType"), now.size):
            return Unfinished(now, "not_taken")
        if place is None:
            return Unfinished(now, "no_place")
        if record is None and answer is not None:
            return Unfinished(now, "taken")
        return Unfinished(now, self._state_beside(record, SourceVersion(bucket, key, current.get("VersionId"), etag)))

    def _state_beside(self, record: SidecarMetadata | None, source: SourceVersion) -> State:
        if record is None:
            return "missing"
        if not record.source.has_content_of(source):
            return "outdated"
        is_of_route = self._route_digest in (None, record.route_digest)
        return "complete" if is_of_route else "other_route"

    def _may_be_sidecar(self, bucket: str, key: str) -> bool:
        before, _, behind = self._template.removeprefix("s3://").replace("{bucket}", bucket).partition("{key}")
        target, _, prefix = before.partition("/")
        return bucket == target and key.startswith(prefix) and key.endswith(behind)


def created_event(topic: str, one: ListedObject) -> OutgoingRecord:
    """An event as AWS sends it when an object is created, keyed by bucket and key; it has no sequencer."""
    bucket, key = split_object_uri(one.uri) or ("", "")
    time = (one.last_modified or datetime.now(UTC)).astimezone(UTC)
    event = {
        "eventVersion": "2.1",
        "eventSource": "aws:s3",
        "eventTime": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "eventName": "ObjectCreated:Put",
        "s3": {
            "s3SchemaVersion": "1.0",
            "configurationId": "nanovllm-reconcile",
            "bucket": {"name": bucket, "arn": f"arn:aws:s3:::{bucket}"},
            "object": {"key": quote_plus(key, safe="/"), "size": one.size, "eTag": one.etag},
        },
    }
    value = json.dumps({"Records": [event]}).encode()
    return OutgoingRecord(topic, f"{bucket}/{key}".encode(), value, (("content-type", b"application/json"),))
