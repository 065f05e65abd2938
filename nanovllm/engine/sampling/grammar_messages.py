"""Messages of llguidance as refusals: the keyword, its path or place, and what to write instead.

llguidance 1.9 names no path. The part of a schema that is refused alone, for the same reason, is the one it means.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from nanovllm.engine.sampling.json_schema import BRANCHES, NAMED, NESTED, subschemas
from nanovllm.engine.sampling.schema_formats import keyword_of

Compile = Callable[[str], str | None]
"""What llguidance says against a grammar; None for a good one."""

_MAX_SEARCH_CPU_S = 0.1
_MESSAGE_CHARS = 300
_NO_VALUE = "Unsatisfiable schema: "

# (what llguidance says, the keyword it is about, what to say instead)
_MEANINGS = (
    (r"oneOf constraints are not supported", "oneOf",
     "more than one of its branches may hold at once: write anyOf, or let every branch require a property with a const "
     "of its own"),
    (r"Value for 'multipleOf' has too many digits", "multipleOf", "write one of fewer digits"),
    (r"Failed to generate regex for (?:float|integer) range.*", "minimum|exclusiveMinimum|maximum|exclusiveMaximum",
     "a bound is too large or has too many digits: write one nearer to 0, of fewer digits"),
    (r"Invalid type: (.*)", "type", r"\1 is none: write array, boolean, integer, null, number, object or string"),
    (r"Unknown format: (.*)", "format", r"\1 is not known: write pattern, or leave it out"),
    (r"schema must be an object or boolean", "", "write an object, true or false for each schema"),
    (r"Unsatisfiable schema: Regex is empty", "pattern|format", "it excludes what the other keywords allow"),
    (r"Expected f64 for '(\w+)', got (.+)", r"\1", r"\2 is no number: write one"),
    (r"Expected (.+?) for '(\w+)', got (.+)", r"\2", r"\3 is no \1: write one"),
    (r"(\w+) must be (an? (?:array|object))", r"\1", r"write \2"),
    (r"Pointer '(.*)' does not exist", "$ref", r"nothing is at #\1: write the path of a schema, such as #/$defs/NAME"),
    (r"Anchor '(.*)' does not exist", "$ref", r"no $anchor is \1: write the path of a schema, such as #/$defs/NAME"),
    (r"Resource '(.*)' is not present", "$ref", r"\1 is not read: put the schema under $defs, and write #/$defs/NAME"),
    (r"patternProperty regexes (.*) and (.*) are not disjoint", "patternProperties",
     r"one name matches both \1 and \2: write patterns of which one matches at most"),
)  # fmt: skip

_REGEX_REMEDIES = {
    "look-around": "write it without",
    "backreferences": "write the text out",
    "unclosed": "close it",
    "unrecognized escape": "write the character itself, or an escape of Rust's regex crate",
    "unrecognized flag": "write a plain group, (?:…)",
}
_LOOKS = {
    "Start": "^", "End": "$", "StartLF": "^", "EndLF": "$", "WordUnicode": r"\b", "WordUnicodeNegate": r"\B",
    "WordAscii": r"\b", "WordAsciiNegate": r"\B",
}  # fmt: skip

_GRAMMAR_REMEDIES = {
    "unknown name": "define it as a rule, in lower case, or as a terminal, in upper case",
    "no start rule found": "write a rule start: …",
    "lexer error": "close every string and expression",
    "circular reference": "write a rule, in lower case, for what holds itself",
}


def refusal(grammar: str, message: str, compile_: Compile) -> str:
    """What to tell about ``grammar``, against which llguidance says ``message``."""
    try:
        given = json.loads(grammar)["grammars"][0]
    except (KeyError, IndexError, ValueError):
        given = {}
    if not isinstance(schema := given.get("json_schema"), dict):
        return _said_of_text(message, is_regex=given.get("name") == "regex")
    schema.pop("x-guidance", None)
    search = _Search(schema, compile_)
    path, part, message = search.part(_without_references(message))
    if (meaning := _meaning(message)) is not None:
        keywords, reason = meaning
        keyword = ", ".join(key for key in keywords if key in part) or search.keyword(part, message)
    else:
        keyword, reason = search.keyword(part, message), _regex_reason(message) or _first_line(message)
    if keyword == "pattern":
        keyword = keyword_of(part)
    if message.startswith(_NO_VALUE):
        return f"no value conforms to {keyword} at {path}: {reason.removeprefix(_NO_VALUE)}"[:_MESSAGE_CHARS]
    return f"{keyword} at {path} cannot be enforced: {reason}"[:_MESSAGE_CHARS]


def _meaning(message: str) -> tuple[list[str], str] | None:
    """The keywords that ``message`` is about, and what it says; None for one that is not in the table."""
    for pattern, keywords, text in _MEANINGS:
        if (found := re.match(pattern, message)) is not None:
            return found.expand(keywords).split("|"), found.expand(text)
    return None


class _Search:
    """The part of ``schema`` that a message is about, and its keyword; within some processor time."""

    def __init__(self, schema: dict[str, Any], compile_: Compile) -> None:
        self._schema, self._compile = schema, compile_
        self._until = time.thread_time() + _MAX_SEARCH_CPU_S

    def part(self, message: str) -> tuple[str, dict[str, Any], str]:
        """The path, the part and what is said against it alone; the whole schema where nothing is found."""
        for path, part, alone in self._alone():
            if time.thread_time() > self._until:
                break
            said = self._message(alone)
            if said == message or (said and said.startswith(_NO_VALUE) and message.startswith(_NO_VALUE)):
                return path, part, said
        return "#", self._schema, message

    def keyword(self, part: dict[str, Any], message: str) -> str:
        """The keyword of ``part`` without which the message does not come."""
        for key in sorted(part, key="type".__eq__):  # without a type almost any value conforms
            if time.thread_time() > self._until:
                break
            rest = {other: value for other, value in part.items() if other != key or key in ("$defs", "definitions")}
            if self._message(self._with_definitions(rest)) != message:
                return key
        return "the schema"

    def _alone(self) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        parts = list(subschemas(self._schema))[::-1]  # the innermost first
        for path, part in parts:
            yield path, part, _shallow(part)
        for path, part in parts:
            if not {"$ref", *BRANCHES}.isdisjoint(part):
                yield path, part, self._with_definitions(part)

    def _with_definitions(self, part: dict[str, Any]) -> dict[str, Any]:
        return {**{key: self._schema[key] for key in ("$defs", "definitions") if key in self._schema}, **part}

    def _message(self, schema: dict[str, Any]) -> str | None:
        said = self._compile(json.dumps({"grammars": [{"json_schema": schema}]}))
        return None if said is None else _without_references(said)


def _without_references(message: str) -> str:
    return re.sub(r"\n\s*while processing \S+", "", message)


def _shallow(part: dict[str, Any]) -> dict[str, Any]:
    """``part`` with schemas inside it that take anything, and without its choices and references."""
    shallow: dict[str, Any] = {}
    for key, value in part.items():
        if key in NAMED and isinstance(value, dict):
            shallow[key] = {name: _anything(inner) for name, inner in value.items()}
        elif key in ("items", "prefixItems") and isinstance(value, list):
            shallow[key] = [_anything(inner) for inner in value]
        elif key in NESTED:
            shallow[key] = _anything(value)
        elif key != "$ref" and not (key in BRANCHES and isinstance(value, list)):
            shallow[key] = value
    return shallow


def _anything(schema: Any) -> Any:
    return True if isinstance(schema, dict) else schema


def _said_of_text(message: str, *, is_regex: bool) -> str:
    """Of an expression, choices or a grammar, whose message begins with its line and column."""
    where = re.match(r"(?:at )?(\d+)\((\d+)\): (?:failed to compile JSON schema: )?", message)
    said = message[where.end() :] if where else message
    meaning = _meaning(said)
    reason = f"{'/'.join(meaning[0])} in %json: {meaning[1]}" if meaning else _regex_reason(said) or _first_line(said)
    if where and not is_regex:  # the library writes an expression as a grammar of one line
        reason = f"line {where[1]}, column {where[2]}: {reason}"
    for begin, remedy in _GRAMMAR_REMEDIES.items():
        if said.startswith(begin):
            reason += f"; {remedy}"
    return reason[:_MESSAGE_CHARS]


def _regex_reason(message: str) -> str | None:
    """What is wrong with an expression, and where in it; None where the message is about something else."""
    if "lookarounds not supported yet" in message:
        found = re.search(r"lookarounds not supported yet; (\w+) in regex /(.*)/", message)
        if found is None:
            return None
        construct = _LOOKS.get(found[1], found[1])
        remedy = "write it at an end of the pattern" if construct in ("^", "$") else "write the pattern without"
        return f"{construct} in {found[2]!r} is not supported: {remedy}"
    if "regex parse error:" not in message:
        return None
    lines = message[message.index("regex parse error:") :].splitlines()
    error = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "it is no regex")
    remedy = next((text for begin, text in _REGEX_REMEDIES.items() if error.startswith(begin)), "correct it")
    marks = next((number for number, line in enumerate(lines) if number > 1 and set(line) == {" ", "^"}), None)
    if marks is None:
        return f"{error}: {remedy}"
    at = lines[marks].index("^")
    construct = lines[marks - 1][at : at + lines[marks].count("^")]
    return f"{construct!r} at character {at - 3}, {error}: {remedy}"


def _first_line(message: str) -> str:
    return next((line for line in message.splitlines() if line.strip()), "refused")[:_MESSAGE_CHARS]
