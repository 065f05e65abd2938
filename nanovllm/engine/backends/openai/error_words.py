"""Errors in the forms of servers: their message and codes, wherever they stand in the JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from nanovllm.engine.backends.foreign_errors import is_too_long, shown

_CODES = ("code", "type", "status", "error_type")
_MESSAGES = ("message", "detail", "title")


@dataclass(frozen=True)
class ServerError:
    """``said``: the message, in one printable line. ``codes``: what the server calls the error, in lower case."""

    said: str
    codes: frozenset[str] = frozenset()

    @property
    def status(self) -> int | None:
        """The HTTP status among the codes, if there is one."""
        numbers = (int(code) for code in self.codes if code.isascii() and code.isdigit() and len(code) == 3)
        return next((number for number in numbers if 400 <= number < 600), None)


def error_in(value: Any, secrets: tuple[str, ...]) -> ServerError | None:
    """The error in decoded JSON, without ``secrets``; None: it says nothing.

    OpenAI's ``{"error": {"message"}}``, Google's list of such objects, ``{"errors": [...]}``, ``{"error": "..."}`` and
    ``{"message"}`` or ``{"detail"}`` alone.
    """
    outer = _first(value)
    if not isinstance(outer, dict):
        return None
    error = _first(outer.get("error") or outer.get("errors"))
    inner = error if isinstance(error, dict) else {}
    holders = [inner, inner.get("innererror"), outer]
    said = error if isinstance(error, str) else None
    said = said or next((one[name] for one in (inner, outer) for name in _MESSAGES if one.get(name)), None)
    if said is None:
        return None
    found = [one.get(name) for one in holders if isinstance(one, dict) for name in _CODES]
    codes = frozenset(str(code).lower() for code in found if isinstance(code, str | int))
    said = shown(said if isinstance(said, str) else json.dumps(said), secrets)
    too_long = next(filter(is_too_long, sorted(codes)), None)
    return ServerError(said if too_long is None or is_too_long(said) else f"{said} ({too_long[:64]})", codes)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value
