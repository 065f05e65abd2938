"""The event of one object, in the terms that all dialects share, and the order of two events of one key."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from nanovllm.objects.versions import lasting_version

Kind = Literal["created", "removed", "test", "other"]
Dialect = Literal["aws", "eventbridge", "minio", "ceph", "versity", "other"]

CLOCK_SKEW_NS = 10**9
"""Two events that the clocks of two nodes put closer together than this have no order."""

_HEX = re.compile(r"[0-9A-Fa-f]{1,64}")
_NS_IN_S = 10**9


@dataclass(frozen=True)
class ObjectEvent:
    """What one event notification says of one object.

    Attributes:
        key: the object's key as the store knows it, decoded.
        version_id: None where the store sends none; "null" is a version of S3's own (versioning is suspended).
        etag: without quotes.
        sequencer: as the store sent it; ``is_newer`` knows what it means.
        kind: ``created``: the object has new content; ``removed``: it or its version is gone; ``test``: S3's test
            event, of no object; ``other``: tags, access, storage class, a multipart upload that begins.
        name: the event's own name, without the prefix ``s3:`` (``ObjectCreated:Put``; EventBridge: ``Object Created``).
        dialect: the form that the event was read in; ``other`` has AWS's form and another source.
    """

    bucket: str
    key: str
    version_id: str | None
    etag: str | None
    sequencer: str | None
    size: int | None
    event_time: datetime | None
    kind: Kind
    name: str
    dialect: Dialect

    @property
    def identity(self) -> tuple[str, str, str | None, str | None]:
        """What two deliveries of one event share: bucket, key, version or ETag, sequencer."""
        version = lasting_version(self.version_id)
        return self.bucket, self.key, self.etag if version is None else version, self.sequencer


def is_newer(event: ObjectEvent, other: ObjectEvent) -> bool | None:
    """Whether ``event`` happened after ``other``; None where that cannot be told, False for one event twice.

    Sequencers compare within one key and one store only, each dialect by its own rule.
    """
    if (event.bucket, event.key) != (other.bucket, other.key):
        return None
    store, rule = _ORDERS[event.dialect]
    if store != _ORDERS[other.dialect][0]:
        return None
    return False if event.identity == other.identity else rule(event, other)


def _by_text(event: ObjectEvent, other: ObjectEvent) -> bool | None:
    """AWS: hexadecimal texts, the shorter one padded with zeros on its right; equal ones are the same event."""
    if not (_is_hex(event.sequencer) and _is_hex(other.sequencer)):
        return None
    one, two = str(event.sequencer).upper(), str(other.sequencer).upper()
    width = max(len(one), len(two))
    one, two = one.ljust(width, "0"), two.ljust(width, "0")
    return None if one == two else one > two


def _by_clock(event: ObjectEvent, other: ObjectEvent) -> bool | None:
    """MinIO and Ceph: the clock of the node that wrote the object."""
    one, two = _clock_ns(event), _clock_ns(other)
    if one is None or two is None or abs(one - two) < CLOCK_SKEW_NS:
        return None
    return one > two


def _clock_ns(event: ObjectEvent) -> int | None:
    """The time in a sequencer, in nanoseconds since 1970."""
    if not _is_hex(event.sequencer):
        return None
    digits = str(event.sequencer)
    if event.dialect == "minio":
        return int(digits, 16)
    # Ceph RGW 14 to 20 writes the memory of its utime_t: seconds and nanoseconds, 32 bits each, in the order of the
    # machine's bytes. Read as one number, the nanoseconds would count most.
    if len(digits) != 16:
        return None
    memory = bytes.fromhex(digits)
    return int.from_bytes(memory[:4], "little") * _NS_IN_S + int.from_bytes(memory[4:], "little")


def _by_counter(event: ObjectEvent, other: ObjectEvent) -> bool | None:
    """Versity: a counter that begins again with each start of the server, so that the time has to agree."""
    if event.event_time is None or other.event_time is None:
        return None
    if not (_is_hex(event.sequencer) and _is_hex(other.sequencer)):
        return None
    counted = int(str(event.sequencer), 16) - int(str(other.sequencer), 16)
    passed_ns = (event.event_time - other.event_time).total_seconds() * _NS_IN_S
    if counted * passed_ns > 0 or (counted and not passed_ns):
        return counted > 0
    # They disagree: after a start the later event has the lower number. Times within one second tell nothing.
    return passed_ns > 0 if abs(passed_ns) > CLOCK_SKEW_NS else None


def _is_hex(sequencer: str | None) -> bool:
    return sequencer is not None and _HEX.fullmatch(sequencer) is not None


def _untold(event: ObjectEvent, other: ObjectEvent) -> None:
    """StorageGRID, NooBaa and what else has AWS's form promise no order."""


# The store whose sequencers compare with one another, and how.
_ORDERS: dict[Dialect, tuple[str, Callable[[ObjectEvent, ObjectEvent], bool | None]]] = {
    "aws": ("aws", _by_text),
    "eventbridge": ("aws", _by_text),
    "minio": ("minio", _by_clock),
    "ceph": ("ceph", _by_clock),
    "versity": ("versity", _by_counter),
    "other": ("other", _untold),
}
