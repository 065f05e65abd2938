"""Validation errors in words: the field and its fault, never its value (it may be a secret, or huge)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from nanovllm.sampling_params import OTHER_NAMES

MAX_ERRORS = 3
MAX_COMPARED = 100
MAX_NAME_CHARS = 64
# Pydantic names Python's types; and a wrong tag is the one value that it repeats.
_IN_WORDS = {
    "union_tag_invalid": "unknown type",
    "tuple_type": "Input should be a list",
    "list_type": "Input should be a list",
    "dict_type": "Input should be an object",
    "model_type": "Input should be an object",
    "model_attributes_type": "Input should be an object",
}


Origin = Callable[[tuple[int | str, ...], str], str | None]
"""By place and message, where a wrong value came from; None where that is not known."""


def describe_errors(
    error: ValidationError,
    root: str,
    data: Any = None,
    origin: Origin = lambda *_: None,
) -> str:
    """One line that names the first wrong fields of ``root``; names that the sender chose are escaped and cut.

    ``data`` is what was validated: a place is then the sender's own, without the names of pydantic's unions.
    """
    items, uncounted = first_errors(error)
    lines = [describe_error(item, root, data, origin) for item in items[:MAX_ERRORS]]
    if (more := len(items) - MAX_ERRORS + uncounted) > 0:
        lines.append(f"and {more} more")
    return "; ".join(lines)


def first_errors(error: ValidationError) -> tuple[list[ErrorDetails], int]:
    """The first errors that say something, without their values; and how many were not looked at."""
    # Each may be compared with every other: a list of wrong items has as many errors as items.
    errors = error.errors(include_url=False, include_input=False, include_context=False)[:MAX_COMPARED]
    # A sequence with a wrong item is also reported as too short: only the item says anything.
    items = [e for e in errors if e["type"] != "too_short" or not any(_is_inside(o["loc"], e["loc"]) for o in errors)]
    return items, error.error_count() - len(errors)


def describe_error(item: ErrorDetails, root: str, data: Any = None, origin: Origin = lambda *_: None) -> str:
    """One error of pydantic's: the field of ``root`` and its fault; the rest as for `describe_errors`."""
    where = ".".join(printable(str(part)) for part in _place_in(data, item["loc"])) or root
    message = _IN_WORDS.get(item["type"]) or item["msg"].removeprefix("Value error, ")
    line = f"{where}: {message}"
    if item["type"] == "extra_forbidden":
        known = OTHER_NAMES.get(str(item["loc"][-1]))
        line = f"unknown name {where}" + (f": did you mean {known}?" if known else "")
    source = origin(item["loc"], message)
    return f"{line} ({source})" if source else line


def _place_in(data: Any, loc: tuple[int | str, ...]) -> list[int | str]:
    """``loc`` without what is no name or index in ``data``; its last part stays, which may be what is missing."""
    if data is None:
        return list(loc)
    place = []
    for at, part in enumerate(loc):
        is_index = isinstance(data, (list, tuple)) and isinstance(part, int) and part < len(data)
        if is_index or (isinstance(data, dict) and part in data):
            data = data[part]
        elif at < len(loc) - 1:
            continue
        place.append(part)
    return place


def _is_inside(place: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(place) > len(outer) and place[: len(outer)] == outer


def is_one_edit(name: str, known: str) -> bool:
    """Whether one letter more, less or other, or two neighbours exchanged, makes ``known`` of another ``name``."""
    if abs(len(name) - len(known)) > 1 or name == known:
        return False
    pairs = enumerate(zip(name, known, strict=False))
    start = next((at for at, (one, other) in pairs if one != other), min(len(name), len(known)))
    one, other = name[start:], known[start:]
    return one[1:] in (other[1:], other) or one == other[1:] or (one[:2] == other[:2][::-1] and one[2:] == other[2:])


def printable(name: str) -> str:
    """``name`` cut to a readable length, control and non-ASCII characters escaped."""
    cut = name if len(name) <= MAX_NAME_CHARS else name[:MAX_NAME_CHARS] + "…"
    return cut.encode("unicode_escape").decode("ascii").replace("\\u2026", "…")
