"""Event notifications of S3 servers, each dialect told by what it says of itself.

Two forms: a record (AWS, MinIO, Ceph RGW, Versity and others: ``eventName`` and ``s3``) and an event of EventBridge
(``detail-type`` and ``detail``). Keys are form-encoded in the records of AWS and MinIO, and nowhere else of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote_plus

from nanovllm.errors import InvalidEvent
from nanovllm.messages.validation import printable
from nanovllm.pipeline.events.event import Dialect, Kind, ObjectEvent

Fields = Mapping[str, Any]

MAJOR_VERSION = "2"
"""Of a record's ``eventVersion``: minor versions add fields only."""
_PREFIX = "s3:"
_TEST_EVENT = "s3:TestEvent"
_SOURCES: dict[str, Dialect] = {"aws:s3": "aws", "minio:s3": "minio", "ceph:s3": "ceph"}
_RAW_KEYS = frozenset({"ceph", "versity"})

_KINDS: dict[str, Kind] = {
    "ObjectCreated": "created",
    "ObjectRemoved": "removed",
    "LifecycleExpiration": "removed",
    "ObjectLifecycle": "removed",  # Ceph: Expiration and its kinds
}
# MinIO files them under ObjectCreated; the content stays what it was.
_OTHER_NAMES = frozenset(
    f"ObjectCreated:{action}" for action in ("PutRetention", "PutLegalHold", "PutTagging", "DeleteTagging")
)
_BRIDGE_KINDS: dict[str, Kind] = {"Object Created": "created", "Object Deleted": "removed"}


def is_notification(part: Fields) -> bool:
    """Whether ``part`` has one of the two forms, or is S3's test event."""
    return (
        part.get("Event") == _TEST_EVENT
        or _is_record(part)
        or (isinstance(part.get("detail"), dict) and "detail-type" in part)
    )


def read_notification(part: Fields) -> ObjectEvent:
    """The event in ``part``, which ``is_notification`` holds for.

    Raises:
        InvalidEvent: a field has the wrong type, the object has no key, or the version is another major one.
    """
    if part.get("Event") == _TEST_EVENT:
        bucket, time = _text(part, "Bucket") or "", _time(part, "Time")
        return ObjectEvent(bucket, "", None, None, None, None, time, "test", "TestEvent", "aws")
    return _read_record(part) if _is_record(part) else _read_bridge_event(part)


def _is_record(part: Fields) -> bool:
    return isinstance(part.get("s3"), dict) and "eventName" in part


def _read_record(record: Fields) -> ObjectEvent:
    version = _text(record, "eventVersion")
    if version is not None and version.partition(".")[0] != MAJOR_VERSION:
        raise InvalidEvent(f"eventVersion {printable(version)} is not of major version {MAJOR_VERSION}")
    name = (_text(record, "eventName") or "").removeprefix(_PREFIX)
    s3 = record["s3"]
    bucket = _mapping(s3, "bucket")
    # Intelligent-Tiering events call it get_object.
    subject = _mapping(s3, "get_object" if "object" not in s3 and "get_object" in s3 else "object")
    dialect = _dialect_of(record, bucket, subject)
    key = _text(subject, "key") or ""
    etag, size = _etag(subject, "eTag"), _size(subject)
    if dialect == "versity" and size == 0 and name != "ObjectCreated:Put":
        size = None  # Versity 1.8 knows the size of a plain PUT only
    return _checked(
        ObjectEvent(
            bucket=_text(bucket, "name") or "",
            key=key if dialect in _RAW_KEYS else _decoded(key),
            version_id=_text(subject, "versionId") or None,
            etag=etag,
            sequencer=_text(subject, "sequencer") or None,
            size=size,
            event_time=_time(record, "eventTime"),
            kind=_kind_of(name, dialect, etag),
            name=name,
            dialect=dialect,
        )
    )


def _dialect_of(record: Fields, bucket: Fields, subject: Fields) -> Dialect:
    source, key = _text(record, "eventSource") or "", _text(subject, "key")
    if source == "aws:s3" and key:
        # Versity 1 calls itself AWS. Its "ARN of the bucket" is that of the object, and AWS's has no slash.
        is_global = (_text(record["s3"], "configurationId") or "").endswith("-global")
        has_prefix = (_text(record, "eventName") or "").startswith(_PREFIX)
        if (_text(bucket, "arn") or "").endswith(f"/{key}") or (is_global and has_prefix):
            return "versity"
    return _SOURCES.get(source, "other")


def _kind_of(name: str, dialect: Dialect, etag: str | None) -> Kind:
    if name in _OTHER_NAMES:
        return "other"
    if dialect == "ceph" and name == "ObjectCreated:Post" and etag is None:
        return "other"  # the start of a multipart upload: there is no object yet
    return _KINDS.get(name.partition(":")[0], "other")


def _read_bridge_event(event: Fields) -> ObjectEvent:
    name, detail = _text(event, "detail-type") or "", _mapping(event, "detail")
    if (source := _text(event, "source")) != "aws.s3":
        raise InvalidEvent(f"the EventBridge event comes from {printable(source or 'no source')}, not from aws.s3")
    if name not in _BRIDGE_KINDS and "object" not in detail:  # CloudTrail's, and those of a bucket
        return ObjectEvent("", "", None, None, None, None, _time(event, "time"), "other", name, "eventbridge")
    subject = _mapping(detail, "object")
    return _checked(
        ObjectEvent(
            bucket=_text(_mapping(detail, "bucket"), "name") or "",
            key=_text(subject, "key") or "",
            version_id=_text(subject, "version-id") or None,
            etag=_etag(subject, "etag"),
            sequencer=_text(subject, "sequencer") or None,
            size=_size(subject),
            event_time=_time(event, "time"),
            kind=_BRIDGE_KINDS.get(name, "other"),
            name=name,
            dialect="eventbridge",
        )
    )


def _checked(event: ObjectEvent) -> ObjectEvent:
    if event.kind in ("created", "removed"):
        for name in ("bucket", "key"):
            if not getattr(event, name):
                raise InvalidEvent(f"the event {printable(event.name)} names no {name}")
    return event


def _mapping(fields: Fields, name: str) -> Fields:
    value = fields.get(name)
    if not isinstance(value, dict):
        raise InvalidEvent(f"{name} is no object of JSON")
    return value


def _text(fields: Fields, name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidEvent(f"{name} is no text")
    return value


def _decoded(key: str) -> str:
    try:
        return unquote_plus(key, errors="strict")
    except UnicodeDecodeError:
        raise InvalidEvent("key is not the form encoding of UTF-8") from None


def _etag(fields: Fields, name: str) -> str | None:
    return (_text(fields, name) or "").strip('"') or None


def _size(fields: Fields) -> int | None:
    size = fields.get("size")
    if isinstance(size, str) and size.isascii() and size.isdigit() and len(size) <= len(str(2**63)):
        size = int(size)  # Ceph RGW before 15
    if size is None or (type(size) is int and size >= 0):
        return size
    raise InvalidEvent("size is no number of bytes")


def _time(fields: Fields, name: str) -> datetime | None:
    text = _text(fields, name)
    if not text:
        return None
    try:
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):  # the latter: a year that UTC does not have
        raise InvalidEvent(f"{name} is no ISO 8601 time") from None
