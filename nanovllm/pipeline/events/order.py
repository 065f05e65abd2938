"""The order of two versions of one object, by the events that told of them."""

from __future__ import annotations

from typing import cast, get_args

from nanovllm.pipeline.events.event import Dialect, ObjectEvent, is_newer
from nanovllm.sinks.sidecar import SourceVersion


def is_newer_version(one: SourceVersion, other: SourceVersion) -> bool | None:
    """Whether ``one`` came after ``other``; None where their events do not tell, as `is_newer`."""
    return is_newer(_event(one), _event(other))


def _event(version: SourceVersion) -> ObjectEvent:
    dialect = version.dialect if version.dialect in get_args(Dialect) else "other"
    return ObjectEvent(
        bucket=version.bucket,
        key=version.key,
        version_id=version.version_id,
        etag=version.etag,
        sequencer=version.sequencer,
        size=None,
        event_time=version.event_time,
        kind="created",
        name="",
        dialect=cast(Dialect, dialect),
    )
