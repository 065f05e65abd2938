"""Kafka records of dead letters, and what bounds their size.

The value is the original message, untouched, and the envelope is in the headers, so that the repaired value can be sent
again as it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from nanovllm.errors import NanoVLLMError
from nanovllm.kafka.records import DEFAULT_MAX_RECORD_BYTES, Headers, OutgoingRecord
from nanovllm.messages.base import Source
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.input_names import input_names
from nanovllm.sinks.kept_headers import OWN_PREFIX, TRACE_HEADERS, kept_headers, rfc3339

DEAD_LETTER_HEADERS = (*TRACE_HEADERS, "content-type")
TRUNCATED_HEADER = f"{OWN_PREFIX}value_truncated"
SHA256_HEADER = f"{OWN_PREFIX}value_sha256"
LEFT_OUT_HEADER = f"{OWN_PREFIX}headers_left_out"
MESSAGE_HEADER = f"{OWN_PREFIX}message"
MAX_MESSAGE_CHARS = 1_000
MIN_TOPIC_BYTES = 8_192
"""What a topic must take for every envelope: a job's id and the message are up to 2 KB and 4 KB, the rest 1.5 KB."""
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*://)(?:[^\s/?#@\"']*@)?(?P<rest>[^\s?#\"'<>]*)[?#]?[^\s\"'<>]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def dead_letter_record(
    letter: DeadLetter,
    topic: str,
    *,
    key: bytes | None,
    value: bytes | None,
    original_headers: Headers = (),
    keep_headers: Sequence[str] = (),
    tenant: tuple[str, bytes] | None = None,
    max_bytes: int = DEFAULT_MAX_RECORD_BYTES,
) -> OutgoingRecord:
    """The original message with ``letter`` in its headers, beside the original ones that ``keep_headers`` names.

    ``tenant``: the original header that names the job's tenant. It is never left out, and no other of its name is kept:
    a replay without it would be another tenant's job.

    What would exceed ``max_bytes`` altogether is cut, never refused: a job that cannot even be reported would stop its
    partition for good. The value is cut first, and keeps its beginning; its digest, its size and where it still lies
    are headers. Then the original headers, the key and the end of the error's message go, in this order. A tombstone
    stays one: a record without a value deletes its key from a compacted topic, an empty value does not.
    """
    names = {*DEAD_LETTER_HEADERS, *(name.lower() for name in keep_headers)}
    envelope = list(_envelope_headers(letter))
    if tenant is not None:
        names.discard(tenant[0].lower())
        envelope.insert(0, tenant)
    kept = tuple(kept_headers(original_headers, names))
    others = len(original_headers) - (tenant is not None)
    left_out = others - len(kept)
    record = OutgoingRecord(topic, key, value, (*kept, *envelope, *_left_out(left_out)))
    if record.size_bytes <= max_bytes:
        return record
    if value is not None:
        envelope += _cut_value(value)
    without_headers = (*envelope, *_left_out(others))
    for kept_key, headers in (
        (key, (*kept, *envelope, *_left_out(left_out))),
        (key, without_headers),
        (None, without_headers),
    ):
        without_value = OutgoingRecord(topic, kept_key, b"", headers)
        if (room := max_bytes - without_value.size_bytes) >= 0:
            return OutgoingRecord(topic, kept_key, None if value is None else value[:room], headers)
    shortest = tuple((name, field[:room] if name == MESSAGE_HEADER else field) for name, field in without_headers)
    return OutgoingRecord(topic, None, None if value is None else b"", shortest)


def envelope_alone(
    topic: str, source: Source, value: bytes | None, tenant: tuple[str, bytes] | None, **fields: str
) -> OutgoingRecord:
    """A dead letter of code ``internal`` where no whole one can be built, of as little as possible.

    ``fields`` of the envelope, where the record lies, and the digest and size of ``value``, as where that is cut.
    """
    now = rfc3339(datetime.now(UTC))
    where = {f"source_{part}": str(one) for part, one in source if one is not None}
    always = {"version": "1", "code": NanoVLLMError.code, "class": "permanent", "retryable": "true"}
    envelope = always | where | fields | {"received_at": now, "failed_at": now}
    headers = tuple((f"{OWN_PREFIX}{name}", field.encode(errors="replace")) for name, field in envelope.items())
    cut = () if value is None else _cut_value(value)
    return OutgoingRecord(topic, None, None if value is None else b"", (*filter(None, [tenant]), *headers, *cut))


def dead_letter_like(
    like: OutgoingRecord, differing: Mapping[str, str | int | None], *, key: bytes | None, value: bytes | None
) -> OutgoingRecord | None:
    """A dead letter whose envelope differs from that of ``like`` in these fields alone.

    None where ``like`` was cut, or one of the fields is unset in either.
    """
    encoded = {OWN_PREFIX + name: str(field).encode() for name, field in differing.items() if field is not None}
    headers = tuple([(name, encoded.pop(name, own)) for name, own in like.headers])
    if encoded or None in differing.values() or any(name == TRUNCATED_HEADER for name, _ in like.headers):
        return None
    return OutgoingRecord(like.topic, key, value, headers)


def read_dead_letter(headers: Iterable[tuple[str, bytes]], value: bytes | None = None) -> DeadLetter:
    """The envelope of a dead letter from its record's headers, with the names of images that its ``value`` has.

    Raises:
        ValueError: the record is no dead letter of ours.
    """
    fields = {
        name.removeprefix(OWN_PREFIX): value.decode(errors="replace")
        for name, value in headers
        if name.startswith(OWN_PREFIX)
    }
    source = {name: fields.get(f"source_{name}") for name in Source.model_fields}
    fields["error_class"] = fields.pop("class", "")
    fields.pop("version", None)
    return DeadLetter.model_validate(fields | {"source": source, "inputs": input_names(value)})


def without_url_queries(text: str) -> str:
    """``text`` with the queries, fragments and user names of its URLs removed: signatures and passwords stand there."""
    # Most texts name none, and the expression looks at every word of them.
    return _URL.sub(lambda url: url["scheme"] + url["rest"], text) if "://" in text else text


def _envelope_headers(letter: DeadLetter) -> Iterator[tuple[str, bytes]]:
    """A header for each field that is set: ``class`` for ``error_class``, ``source_topic`` for ``source.topic``."""
    message = _CONTROL.sub(" ", without_url_queries(letter.message))[:MAX_MESSAGE_CHARS]
    fields = dict(letter) | {"message": message}
    # Names of images are the sender's words, which headers never repeat; the value has them.
    del fields["inputs"]
    for name, field in fields.items():
        if isinstance(field, Source):
            yield from (_header(f"source_{part}", value) for part, value in field if value is not None)
        elif field is not None:
            yield _header("class" if name == "error_class" else name, field)


def _header(name: str, field: Any) -> tuple[str, bytes]:
    if isinstance(field, datetime):
        field = rfc3339(field)
    elif isinstance(field, bool):
        field = str(field).lower()
    return f"{OWN_PREFIX}{name}", str(field).encode(errors="replace")


def _cut_value(value: bytes) -> Headers:
    return (
        (TRUNCATED_HEADER, b"true"),
        (SHA256_HEADER, hashlib.sha256(value).hexdigest().encode()),
        (f"{OWN_PREFIX}value_size", str(len(value)).encode()),
    )


def _left_out(count: int) -> Headers:
    return ((LEFT_OUT_HEADER, str(count).encode()),) if count else ()
