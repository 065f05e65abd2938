"""Decoding of jobs from JSON and msgpack, told apart by the first byte; what the two cannot both say is refused."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

import msgpack
from pydantic import ValidationError

from nanovllm.errors import InvalidJob, UnsupportedVersion
from nanovllm.messages.encoding import MAX_DEPTH, MAX_INTEGER, MessageFormat, check_json_value, encode
from nanovllm.messages.job import Job
from nanovllm.messages.sent_job_id import sent_job_id, valid_job_id
from nanovllm.messages.validation import describe_errors

VERSION = 1
MAX_VALUES = 100_000
"""Most values in a message. Reading that many holds the event loop for about a tenth of a second."""
_JSON_SPACE = b" \t\r\n"
_MAX_DIGITS = len(str(MAX_INTEGER))


def message_format(value: bytes) -> MessageFormat:
    """The format of an encoded job, by its first byte.

    Raises:
        InvalidJob: neither a JSON object nor a msgpack map can begin so.
    """
    first = value.lstrip(_JSON_SPACE)[:1]
    if first == b"{":
        return "json"
    # fixmap, map 16, map 32; leading white space is JSON's alone
    if value and (value[0] & 0xF0 == 0x80 or value[0] in (0xDE, 0xDF)):
        return "msgpack"
    raise InvalidJob("the message is empty" if not value else "the message is neither a JSON object nor a msgpack map")


def decode_job(value: bytes, *, max_bytes: int | None = None) -> Job:
    """The job that an untrusted message holds.

    Raises:
        InvalidJob: whatever else the bytes are, or more than ``max_bytes`` of them; the message names the field, never
            its value. It has the job's id where that can be found.
        UnsupportedVersion: a job of another major version.
    """
    try:
        if max_bytes is not None and len(value) > max_bytes:
            # Before it is read: parsing holds the event loop, and with it the heartbeats.
            raise InvalidJob(f"the message has {len(value)} bytes, above the limit of {max_bytes}")
        fields = decode_fields(value)
    except InvalidJob as error:
        error.job_id = sent_job_id(value)
        raise
    return job_of_fields(fields)


def job_of_fields(fields: dict[str, Any]) -> Job:
    """The job of a decoded message. Raises InvalidJob and UnsupportedVersion as ``decode_job``."""
    version = fields.get("version", VERSION)
    if type(version) is not int:  # True and 1.0 equal 1
        raise _of_job(fields, InvalidJob("version: is not an integer"))
    if version != VERSION:
        raise _of_job(fields, UnsupportedVersion(f"the job has version {version}, this worker knows {VERSION}"))
    try:
        return Job.model_validate(fields)
    except ValidationError as error:
        raise _of_job(fields, InvalidJob(describe_errors(error, "job", fields))) from None


def _of_job(fields: dict[str, Any], error: InvalidJob) -> InvalidJob:
    error.job_id = valid_job_id(fields.get("job_id"))
    return error


def decode_fields(value: bytes) -> dict[str, Any]:
    """The fields of an untrusted message, not yet those of a job; bytes stand at most in ``data``, and in msgpack.

    Raises:
        InvalidJob: bytes that are no JSON object and no msgpack map, or hold what the other of the two cannot.
    """
    is_json = message_format(value) == "json"
    fields: dict[str, Any] = decode_json(value) if is_json else _parse_msgpack(value)
    if not is_json:
        _check_values(fields, allow_bytes_in="data")
    return fields


def decode_json(value: bytes) -> Any:
    """The value of an untrusted JSON text, of at most ``MAX_VALUES`` values and ``MAX_DEPTH`` levels.

    Raises:
        InvalidJob: it is no JSON, is too large for these bounds, or means something else to other readers.
    """
    parsed = _parse_json(value)
    # The parser has checked numbers. Without an escape no text holds half a character, and what opens so few arrays and
    # objects nests no deeper.
    if rb"\u" in value or value.count(b"[") + value.count(b"{") > MAX_DEPTH:
        _check_values(parsed)
    return parsed


def _check_values(fields: Any, *, allow_bytes_in: str | None = None) -> None:
    try:
        check_json_value(fields, allow_bytes_in=allow_bytes_in)
    except ValueError as error:
        raise InvalidJob(f"the message holds {error}") from None


def encode_job(job: Job, fmt: MessageFormat = "json") -> bytes:
    """``job`` as a message: JSON, or msgpack with images as raw bytes (a third smaller)."""
    return encode(job, fmt)


def _parse_json(value: bytes) -> Any:
    # Before any value becomes an object.
    if _most_values(value) > MAX_VALUES and _most_values(_outside_strings(value)) > MAX_VALUES:
        raise InvalidJob(_TOO_MANY_VALUES)
    try:
        return _STRICT_JSON.decode(value.decode())
    except UnicodeDecodeError:
        raise InvalidJob("the message is not valid UTF-8") from None
    except RecursionError:
        raise InvalidJob("the message is nested too deeply") from None
    except json.JSONDecodeError as error:
        # Some of Python's messages end with the word: "Unterminated string starting at".
        what = error.msg.removesuffix(" at")
        raise InvalidJob(f"the message is not valid JSON: {what} at character {error.pos}") from None


def _most_values(json_bytes: bytes) -> int:
    # A value stands behind a comma, or first in an array or object; the message itself is one.
    return 1 + sum(map(json_bytes.count, (b",", b"[", b"{")))


def _outside_strings(value: bytes) -> bytes:
    unescaped = value.replace(rb"\\", b"").replace(rb"\"", b"")
    # Names and values are at most two strings each; split() would make an object of every one.
    if unescaped.count(b'"') > 4 * MAX_VALUES:
        raise InvalidJob(_TOO_MANY_VALUES)
    return b"".join(unescaped.split(b'"')[::2])


def _parse_msgpack(value: bytes) -> Any:
    left = MAX_VALUES

    def count(items: list[Any]) -> list[Any]:
        nonlocal left
        left -= 1 + len(items)  # an empty list is a value too
        if left < 0:
            raise InvalidJob(_TOO_MANY_VALUES)
        return items

    try:
        return msgpack.unpackb(
            value,
            raw=False,
            strict_map_key=True,
            list_hook=count,
            object_pairs_hook=lambda pairs: _unique_keys(count(pairs)),
            ext_hook=_refuse_extension,
            max_array_len=MAX_VALUES,
            max_map_len=MAX_VALUES,
        )
    except InvalidJob:
        raise
    except UnicodeDecodeError:
        raise InvalidJob("the message holds a string that is not valid UTF-8") from None
    except (msgpack.exceptions.UnpackException, ValueError, TypeError, RecursionError, OverflowError):
        # Incomplete, trailing bytes, lengths beyond the buffer, keys that are no strings: msgpack's texts repeat bytes.
        raise InvalidJob("the message is not one complete msgpack map with string keys") from None


def _unique_keys(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise InvalidJob("the message holds a key twice")
    return unique


def _exact_int(digits: str) -> int:
    # Before int(): a number of a million digits takes quadratic time.
    if len(digits.lstrip("-")) > _MAX_DIGITS or abs(number := int(digits)) > MAX_INTEGER:
        raise InvalidJob("the message holds an integer beyond 2^53")
    return number


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise InvalidJob("the message holds a number beyond the range of a double")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidJob(f"the message holds {name}, which JSON does not have")


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise InvalidJob("the message holds a msgpack extension type")


_TOO_MANY_VALUES = f"the message holds more than {MAX_VALUES} values"

# Made once: json.loads() makes one for every call that has hooks.
_STRICT_JSON = json.JSONDecoder(
    object_pairs_hook=_unique_keys,
    parse_int=_exact_int,
    parse_float=_finite_float,
    parse_constant=_refuse_constant,
)
