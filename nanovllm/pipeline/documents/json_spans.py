"""JSON parser that keeps the character span of each leaf, and refuses what readers would read differently."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from json.decoder import scanstring  # type: ignore[attr-defined]  # typeshed leaves it out; documented in the source
from typing import Any, NoReturn

from nanovllm.messages.document_record import Span
from nanovllm.messages.encoding import MAX_DEPTH, check_json_value

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_LITERALS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class ParsedOutput:
    """A JSON value and, by JSON pointer, the span of each leaf's text: of a string what stands between its quotes."""

    value: Any
    spans: Mapping[str, Span]


def parse_output(text: str) -> ParsedOutput:
    """Parse an output as strict JSON.

    Raises:
        ValueError: no JSON, or a value that readers would take differently: duplicate keys, NaN, an integer beyond
            2^53, a lone surrogate, more than ``MAX_DEPTH`` levels. The message names the place, never the text.
    """
    parser = _Parser(text)
    value = parser.document()
    check_json_value(value)
    return ParsedOutput(value, parser.spans)


def leaves(value: Any, pointer: str = "") -> Iterator[tuple[str, Any]]:
    """JSON pointer and value of each leaf: scalars, and objects and arrays that are empty."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from leaves(item, f"{pointer}/{escaped(name)}")
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from leaves(item, f"{pointer}/{index}")
    else:
        yield pointer, value


def escaped(name: str) -> str:
    """A property's name as a part of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.spans: dict[str, Span] = {}

    def document(self) -> Any:
        value = self._value("", 0)
        self._skip_space()
        if self._at < len(self._text):
            self._refuse("text behind the value")
        return value

    def _value(self, pointer: str, depth: int) -> Any:
        self._skip_space()
        if depth > MAX_DEPTH:
            self._refuse(f"more than {MAX_DEPTH} levels of nesting")
        start = self._at
        match self._text[start : start + 1]:
            case "{":
                value: Any = self._object(pointer, depth)
            case "[":
                value = self._array(pointer, depth)
            case '"':
                value = self._string()
                # An empty string has no character of its own: its quotes stand for it.
                self.spans[pointer] = (start + 1, self._at - 1) if self._at - start > 2 else (start, self._at)
                return value
            case _:
                value = self._scalar()
        if not isinstance(value, (dict, list)) or not value:
            self.spans[pointer] = (start, self._at)
        return value

    def _object(self, pointer: str, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in self._items("}"):
            self._skip_space()
            if self._text[self._at : self._at + 1] != '"':
                self._refuse("a name in double quotes is missing")
            name = self._string()
            if name in found:
                self._refuse("a name that stands twice in one object")
            self._skip_space()
            self._take(":")
            found[name] = self._value(f"{pointer}/{escaped(name)}", depth + 1)
        return found

    def _array(self, pointer: str, depth: int) -> list[Any]:
        found: list[Any] = []
        for index in self._items("]"):
            found.append(self._value(f"{pointer}/{index}", depth + 1))
        return found

    def _items(self, end: str) -> Iterator[int]:
        """Counts the items of an object or array from its bracket on, and takes what stands between them."""
        self._at += 1
        self._skip_space()
        index = 0
        while index or self._text[self._at : self._at + 1] != end:
            yield index
            index += 1
            self._skip_space()
            if self._text[self._at : self._at + 1] == end:
                break
            self._take(",")
        self._at += 1

    def _string(self) -> str:
        try:
            value, self._at = scanstring(self._text, self._at + 1, True)
        except ValueError:
            self._refuse("a string that does not end, or a wrong escape in it")
        return str(value)

    def _scalar(self) -> Any:
        for literal, value in _LITERALS.items():
            if self._text.startswith(literal, self._at):
                self._at += len(literal)
                return value
        number = _NUMBER.match(self._text, self._at)
        if number is None:
            self._refuse("a value is missing" if self._at < len(self._text) else "the output ends before the value")
        self._at = number.end()
        is_integer = number[1] is None and number[2] is None
        # int() refuses more than 4,300 digits; no integer beyond 2^53 is accepted, which has 16.
        return int(number[0][:20]) if is_integer else float(number[0])

    def _take(self, character: str) -> None:
        if self._text[self._at : self._at + 1] != character:
            self._refuse(f"{character!r} is missing")
        self._at += 1

    def _skip_space(self) -> None:
        match = _SPACE.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"no JSON at character {self._at}: {what}")
