"""The sidecar sink: the record of an object as an object of its own, beside it or at another place.

``x-amz-meta-nanovllm-*`` says which version of which object the record describes. A write is conditional, so that of
several workers with one object's versions the newest record stays, in whatever order they write.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import quote, unquote

from botocore.exceptions import ClientError

from nanovllm.errors import FetchFailed, InvalidInput, SidecarTaken
from nanovllm.messages.s3_uri import split_object_uri
from nanovllm.objects.conditional_put import put_if_absent, put_if_unchanged
from nanovllm.objects.errors import status_of
from nanovllm.objects.versions import lasting_version
from nanovllm.settings.routes import CONTENT_TYPES, SidecarFormat

SidecarOutcome = Literal["written", "same", "superseded"]

MAX_REPLACEMENTS = 16
"""Other writers that a put gives way to before it is transient failure."""
MAX_VALUE_BYTES = 160
"""Of a value of metadata: ten of them and their names stay below the 2 KB of user metadata that S3 takes."""
_PREFIX = "nanovllm-"
_HASHED = "sha256:"
# Neither "=" nor "?": botocore and servers read "=?utf-8?…?=" as an encoded word of RFC 2047.
_SAFE = "/:+,@~"
_MARK_BITS = 32


@dataclass(frozen=True)
class SourceVersion:
    """One version of an object, in the terms of its event; ``etag`` without quotes.

    ``event_time`` and ``dialect`` are what the rule of a sequencer may need besides.
    """

    bucket: str
    key: str
    version_id: str | None = None
    etag: str | None = None
    sequencer: str | None = None
    event_time: datetime | None = None
    dialect: str | None = None

    def has_content_of(self, other: SourceVersion) -> bool:
        """Whether both are one version, or versions of equal content where the store tells no versions apart."""
        versions = [lasting_version(one.version_id) for one in (self, other)]
        if None not in versions:
            return versions[0] == versions[1]
        return self.etag is not None and self.etag == other.etag


@dataclass(frozen=True)
class SidecarMetadata:
    """What a sidecar says of its record: the job, the model, the route, and the version of the source.

    ``delivery`` names the Kafka record whose worker wrote it, and publishes it; None: no Kafka record.
    """

    job_id: str
    model_revision: str
    route_digest: str
    source: SourceVersion
    delivery: str | None = None

    def to_headers(self) -> dict[str, str]:
        """User metadata of S3: ASCII, and bounded; longer values are told by their digest, which still compares."""
        source, time = self.source, self.source.event_time
        values = {
            "job-id": self.job_id,
            "model-revision": self.model_revision,
            "route-digest": self.route_digest,
            "source": _identity(source.bucket, source.key),
            "source-version": source.version_id,
            "source-etag": source.etag,
            "source-sequencer": source.sequencer,
            "source-time": None if time is None else time.astimezone(UTC).isoformat(),
            "source-dialect": source.dialect,
            "delivery": self.delivery,
        }
        return {_PREFIX + name: _encoded(value) for name, value in values.items() if value is not None}

    @classmethod
    def of(cls, headers: Mapping[str, str], bucket: str, key: str) -> SidecarMetadata | None:
        """What ``headers`` say of the object ``key`` in ``bucket``; None where they are no sidecar's of it."""
        # Servers differ in the case of names.
        found = {name.lower(): unquote(value) for name, value in headers.items()}
        if found.get(_PREFIX + "source") != _identity(bucket, key):
            return None
        get = found.get

        def name_of(name: str) -> str:
            return get(_PREFIX + name) or ""

        try:
            time = datetime.fromisoformat(name_of("source-time"))
        except ValueError:
            time = None
        source = SourceVersion(
            bucket=bucket,
            key=key,
            version_id=get(_PREFIX + "source-version"),
            etag=get(_PREFIX + "source-etag"),
            sequencer=get(_PREFIX + "source-sequencer"),
            event_time=time if time is None or time.tzinfo else time.replace(tzinfo=UTC),
            dialect=get(_PREFIX + "source-dialect"),
        )
        job_id, model, route = name_of("job-id"), name_of("model-revision"), name_of("route-digest")
        return cls(job_id, model, route, source, get(_PREFIX + "delivery"))

    def is_done_by(self, there: SidecarMetadata) -> bool:
        """Whether the record ``there`` is of this version and route."""
        ours, theirs = _stored(self), _stored(there)
        return ours.route_digest == theirs.route_digest and ours.source.has_content_of(theirs.source)


IsNewer = Callable[[SourceVersion, SourceVersion], bool | None]
"""Whether the first version, of one object, came after the second; None where their events do not tell."""


def is_sidecar(headers: Mapping[str, str]) -> bool:
    """Whether user metadata is that of a sidecar, of whatever object: no route may take it for a document."""
    return any(name.lower() == _PREFIX + "source" for name in headers)


def sidecar_uri(template: str, bucket: str, key: str) -> str:
    """The URI of the sidecar of an object; ``template`` has ``{key}`` once, and ``{bucket}`` where needed.

    Raises:
        InvalidInput: its key is longer than S3 takes.
    """
    before, _, behind = template.partition("{key}")
    uri = before.replace("{bucket}", bucket) + key + behind.replace("{bucket}", bucket)
    if split_object_uri(uri) is None:
        raise InvalidInput(f"the sidecar of s3://{bucket}/{key} has no possible key: {template} makes it too long")
    return uri


class Sidecar:
    """Writes sidecars. ``call`` runs an operation with a boto3 S3 client in the calling thread (``S3Client.call``).

    The client reads the sources too: where ``is_newer`` cannot tell, the version that the source has now is the newest.
    """

    def __init__(self, call: Callable[[Callable[[Any], Any]], Any], is_newer: IsNewer) -> None:
        self._call = call
        self._is_newer = is_newer

    async def put(self, uri: str, body: bytes, metadata: SidecarMetadata, fmt: SidecarFormat) -> SidecarOutcome:
        """Store ``body`` at ``uri``: ``written``; ``same``: it is there; ``superseded``: a newer version's is there.

        What the same Kafka record has written before is ``written``: its worker ended before it was published.

        A record of this version by another route digest is replaced: the route was changed since.

        Raises:
            SidecarTaken: an object is there that is no sidecar of this source. It stays.
            InvalidInput: ``uri`` names no object.
            NanoVLLMError: as ``S3Client.call``; TransientError where other writers won every time.
        """
        place = split_object_uri(uri)
        if place is None:
            raise InvalidInput(f"{uri} is not the URI of an object")
        outcome: SidecarOutcome = await asyncio.to_thread(
            self._call, lambda client: self._put(client, *place, body, metadata, fmt)
        )
        return outcome

    async def beside(self, uri: str, metadata: SidecarMetadata) -> SidecarOutcome | None:
        """What ``put`` would return without writing; None where it would write.

        Raises:
            SidecarTaken, NanoVLLMError: as ``put``.
        """
        place = split_object_uri(uri)
        if place is None:
            return None
        outcome: SidecarOutcome | None = await asyncio.to_thread(
            self._call, lambda client: self._outcome_at(client, *place, metadata)[0]
        )
        return outcome

    async def read(self, uri: str, bucket: str, key: str) -> SidecarMetadata | None:
        """What the sidecar at ``uri`` says of the object ``key`` in ``bucket``; None where it has none.

        Raises:
            NanoVLLMError: as ``S3Client.call``.
        """
        place = split_object_uri(uri)
        if place is None:
            return None
        answer = await asyncio.to_thread(self._call, lambda client: head_or_none(client, *place))
        return None if answer is None else SidecarMetadata.of(answer.get("Metadata", {}), bucket, key)

    def _put(
        self, client: Any, bucket: str, key: str, body: bytes, metadata: SidecarMetadata, fmt: SidecarFormat
    ) -> SidecarOutcome:
        request = {
            "Bucket": bucket,
            "Key": key,
            "Body": _marked(body, metadata),
            "ContentType": CONTENT_TYPES[fmt],
            "Metadata": metadata.to_headers(),
        }
        for _ in range(MAX_REPLACEMENTS):
            if put_if_absent(client, **request):
                return "written"
            outcome, etag = self._outcome_at(client, bucket, key, metadata)
            if outcome is not None:
                return outcome
            if etag is not None and put_if_unchanged(client, etag, **request):
                return "written"
        raise FetchFailed(f"s3://{bucket}/{key} was changed by other writers {MAX_REPLACEMENTS} times meanwhile")

    def _outcome_at(
        self, client: Any, bucket: str, key: str, ours: SidecarMetadata
    ) -> tuple[SidecarOutcome | None, str | None]:
        """What is left to do beside the object that is there, and its entity tag; None: there is none."""
        answer, source = head_or_none(client, bucket, key), ours.source
        if answer is None:
            return None, None
        there = SidecarMetadata.of(answer.get("Metadata", {}), source.bucket, source.key)
        if there is None:
            raise SidecarTaken(
                f"s3://{bucket}/{key} is not the record of s3://{source.bucket}/{source.key}: another object of "
                "that name is there, and it is not overwritten"
            )
        return self._outcome_beside(client, ours, there), answer["ETag"]

    def _outcome_beside(self, client: Any, ours: SidecarMetadata, there: SidecarMetadata) -> SidecarOutcome | None:
        """What is left to do beside the record that is ``there``; None: replace it."""
        is_newer = self._is_newer(ours.source, there.source)
        if ours.delivery is not None and _stored(ours).delivery == there.delivery:
            return "written" if ours.is_done_by(there) else None
        if ours.is_done_by(there):
            # Content that came back (A, B, A) is written once more: its record must not look older than that of B.
            return None if is_newer else "same"
        if is_newer is None and not _stored(ours).source.has_content_of(_stored(there).source):
            is_newer = _is_current(client, ours.source)
        return "superseded" if is_newer is False and not _is_one_event(ours, there) else None


def head_or_none(client: Any, bucket: str, key: str) -> Mapping[str, Any] | None:
    """The answer to HeadObject; None where there is no such object."""
    try:
        answer: Mapping[str, Any] = client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if status_of(error) == 404 and error.response["Error"].get("Code") != "NoSuchBucket":
            return None
        raise
    return answer


def _is_current(client: Any, source: SourceVersion) -> bool:
    """Whether the source has this version now. Where it has another or none, the event of that one is to come."""
    answer = head_or_none(client, source.bucket, source.key)
    if answer is None:
        return False
    now = SourceVersion(source.bucket, source.key, answer.get("VersionId"), answer["ETag"].strip('"'))
    return source.has_content_of(now)


def _is_one_event(ours: SidecarMetadata, there: SidecarMetadata) -> bool:
    one, other = _stored(ours).source, _stored(there).source
    return one.sequencer == other.sequencer and one.has_content_of(other)


def _stored(metadata: SidecarMetadata) -> SidecarMetadata:
    """``metadata`` as a reader of its sidecar sees it: long values by their digest."""
    source = metadata.source
    return SidecarMetadata.of(metadata.to_headers(), source.bucket, source.key) or metadata


def _identity(bucket: str, key: str) -> str:
    return hashlib.sha256(f"{bucket}/{key}".encode("utf-8", "surrogatepass")).hexdigest()


def _encoded(value: str) -> str:
    data = value.encode("utf-8", "surrogatepass")
    encoded = quote(data, safe=_SAFE)
    return encoded if len(encoded) <= MAX_VALUE_BYTES else _HASHED + hashlib.sha256(data).hexdigest()


def _marked(body: bytes, metadata: SidecarMetadata) -> bytes:
    """``body``, and white space at the end of its last line that differs between versions of the source.

    An entity tag is the MD5 of the body alone: If-Match would take the record of a newer version for that of the one
    that was read, where both have equal text.
    """
    if not body.strip():
        return body  # a line of white space is no JSON line
    source = metadata.source
    version = repr((source.version_id, source.etag, source.sequencer, source.event_time, metadata.route_digest))
    bits = int.from_bytes(hashlib.sha256(version.encode("utf-8", "surrogatepass")).digest()[: _MARK_BITS // 8])
    mark = f"{bits:0{_MARK_BITS}b}".replace("0", " ").replace("1", "\t")
    return body.rstrip() + mark.encode() + b"\n"
