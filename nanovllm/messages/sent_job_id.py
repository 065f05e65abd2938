"""The ``job_id`` of a message that is no valid job, so that its dead letter keeps it."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import Any

import msgpack
from pydantic import TypeAdapter, ValidationError

from nanovllm.messages.job import JobId

MAX_TOKENS = 10_000
"""Most tokens of a JSON message, or keys of a msgpack map, that are looked at: milliseconds."""

MAX_BYTES = 1 << 20
"""Bytes of a JSON message that are looked at: the expression holds the interpreter while it reads one long string."""

_JOB_ID: TypeAdapter[str] = TypeAdapter(JobId)
# The closing quote is optional: a string that does not end would be searched again from each quote within it.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[{}\[\]:,]|[^"{}\[\]:,]++', re.DOTALL)
_BROKEN_MSGPACK = (msgpack.exceptions.UnpackException, ValueError, TypeError, OverflowError, RecursionError)


def valid_job_id(value: Any) -> str | None:
    """``value`` where it is the id of a job; else None."""
    try:
        return _JOB_ID.validate_python(value, strict=True)
    except ValidationError:
        return None


def sent_job_id(value: bytes) -> str | None:
    """The ``job_id`` of a JSON or msgpack message, complete or not; None where none is found near its beginning."""
    return _in_msgpack(value) if value and value[0] >= 0x80 else job_id_in_json(value)


def job_id_in_json(value: bytes) -> str | None:
    """As ``sent_job_id``, for JSON alone: by a regular expression, which no message can bring down."""
    depth, before = 0, (b"", b"")
    for found in islice(_TOKEN.finditer(value, 0, MAX_BYTES), MAX_TOKENS):
        token = found[0]
        if token.isspace():
            continue
        if depth == 1 and before == (b'"job_id"', b":"):
            return _from_json(token)
        depth += (token in b"{[") - (token in b"}]")
        before = (before[1], token) if depth == 1 else (b"", b"")
    return None


def _from_json(token: bytes) -> str | None:
    try:
        return valid_job_id(json.loads(token))
    except ValueError:
        return None


def _in_msgpack(value: bytes) -> str | None:
    # Skipping builds no object, whatever lengths the message claims; keys and the id itself are short.
    unpacker = msgpack.Unpacker(
        raw=True, max_buffer_size=len(value), max_str_len=4_096, max_array_len=0, max_map_len=0, max_ext_len=0
    )
    unpacker.feed(value)
    try:
        for _ in range(min(unpacker.read_map_header(), MAX_TOKENS)):
            if unpacker.unpack() == b"job_id":
                return valid_job_id(unpacker.unpack().decode())
            unpacker.skip()
    except (*_BROKEN_MSGPACK, AttributeError):  # an id that is a number has no decode()
        pass
    return None
