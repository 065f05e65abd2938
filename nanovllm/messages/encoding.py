"""Encoding of messages. JSON is canonical; msgpack carries the same values, and raw bytes in ``data``."""

from __future__ import annotations

import math
from datetime import datetime
from itertools import repeat
from typing import Any, Literal

import msgpack
from pydantic import BaseModel

MessageFormat = Literal["json", "msgpack"]

CONTENT_TYPES: dict[MessageFormat, str] = {"json": "application/json", "msgpack": "application/msgpack"}

MAX_DEPTH = 32
MAX_INTEGER = 2**53  # beyond it, a reader whose numbers are doubles gets another number than was sent


def encode(message: BaseModel, fmt: MessageFormat) -> bytes:
    """``message`` as JSON or msgpack, without the fields that are unset (None)."""
    if fmt == "json":
        return message.__pydantic_serializer__.to_json(message, exclude_none=True)  # as bytes, never as text
    packed: bytes = msgpack.packb(message.model_dump(exclude_none=True), use_bin_type=True, default=_to_json_value)
    return packed


def check_json_value(value: Any, *, allow_bytes_in: str | None = None) -> None:
    """Check that ``value`` means the same to every JSON and msgpack reader.

    Args:
        allow_bytes_in: the one key whose value may be bytes.

    Raises:
        ValueError: NaN, an infinity, an integer beyond 2^53, a key that is no string, a lone surrogate, bytes, another
            type, or more than ``MAX_DEPTH`` levels. The message never repeats the value.
    """
    # A stack of our own: the sender chooses the depth, and Python's stack must not be the limit. Of containers alone,
    # because every value of a message comes by here while the event loop waits.
    stack: list[tuple[Any, int]] = [((value,), 0)]
    while stack:
        container, depth = stack.pop()
        if depth > MAX_DEPTH and container:
            raise ValueError(f"more than {MAX_DEPTH} levels of nesting")
        for key, item in container.items() if isinstance(container, dict) else zip(repeat(None), container):
            if isinstance(container, dict):
                if not isinstance(key, str):
                    raise ValueError("a key that is not a string")
                _check_text(key)
            if item is None or isinstance(item, bool):
                continue
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, int):
                if abs(item) > MAX_INTEGER:
                    raise ValueError("an integer beyond 2^53")
            elif isinstance(item, float):
                if not math.isfinite(item):
                    raise ValueError("NaN or an infinity")
            elif isinstance(item, (list, tuple, dict)):
                stack.append((item, depth + 1))
            elif not isinstance(item, bytes) or key is None or key != allow_bytes_in:
                raise ValueError(f"a value of type {type(item).__name__}, which JSON does not have")


def _check_text(text: str) -> None:
    # A lone surrogate (JSON's "\ud800") is a str for Python and nothing that UTF-8 can carry.
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("text that is not valid Unicode") from None


def _to_json_value(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")  # as pydantic writes it in JSON
    raise TypeError(f"cannot encode {type(value).__name__}")
