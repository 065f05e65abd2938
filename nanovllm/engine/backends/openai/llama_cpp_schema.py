"""JSON schemas for llama.cpp's server: what its grammars leave out, without a word, is refused here by name.

By its source (version 0.5.0): `$ref`, `oneOf`, `anyOf`, `const` and `enum` each hide what stands beside them, `oneOf`
is read as `anyOf`, and the type decides which other keywords are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from nanovllm.engine.sampling.json_schema import subschemas
from nanovllm.engine.sampling.schema_refusals import ASSERTIONS

_ALONE = ("$ref", "oneOf", "anyOf", "const", "enum")
_READ = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
"""Keywords that a grammar holds, by the type that they are read with."""
_ABOUT = {
    "object": {"patternProperties", "propertyNames", "minProperties", "maxProperties", "dependentRequired",
               "dependentSchemas", "dependencies", "unevaluatedProperties"},
    "array": {"additionalItems", "contains", "minContains", "maxContains", "uniqueItems", "unevaluatedItems"},
    "string": {"contentEncoding", "contentMediaType", "contentSchema"},
    "integer": {"multipleOf"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}  # fmt: skip
"""Keywords that assert something of one type and that no grammar holds."""
_OF_A_TYPE = {key for keys in (*_READ.values(), *_ABOUT.values()) for key in keys}
_DEFINITIONS = {"$defs", "definitions", "type"}
_FORMATS = re.compile(r"date|time|date-time|uuid[1-5]?")
_IN_A_CLASS = r'[^\\\[\]]|\\[\\\[\]"trn-]'
_PATTERNS = re.compile(
    rf'\^(?:[^\\\[\](){{}}^$]|\\[\^$.\[\]()|{{}}*+?\\"trn-]|\[(?:{_IN_A_CLASS})+\]|\((?:\?:|(?!\?))|\)|\{{[\d,]+\}})*\$'
)
"""Of regular expressions, those that become grammars: anchored at both ends, without `\\d`, `\\w` and look-arounds."""


def left_out(schema: dict[str, Any]) -> Iterator[str]:
    """What an answer of llama.cpp's server need not conform to: keywords with their paths in ``schema``."""
    for path, part in subschemas(schema):
        for key in _left_out(part):
            yield f"{key} at {path}"


def _left_out(part: dict[str, Any]) -> Iterator[str]:
    asserted = ASSERTIONS & part.keys() - _DEFINITIONS
    for key in _ALONE:
        if key in asserted:
            yield from sorted(asserted - {key})
            return
    types = _types(part)
    read = {key for one in types for key in _READ.get(one, ())} - {key for one in types for key in _ABOUT.get(one, ())}
    # Of another type than those that are named: it asserts nothing.
    others = _OF_A_TYPE.difference(*(_of(one) for one in types)) if "type" in part else set()
    yield from sorted(asserted - others - (read - _hidden(part)))


def _of(kind: str) -> set[str]:
    """Keywords that assert something of values of one type."""
    return {*_READ.get(kind, ()), *_ABOUT.get(kind, ())}


def _types(part: dict[str, Any]) -> list[str]:
    """The types that a grammar has for ``part``; without a type, that of the first keywords that have one."""
    if "type" in part:
        named = part["type"]
        return [one for one in (named if isinstance(named, list) else [named]) if isinstance(one, str)]
    return [one for one in ("object", "array", "string") if part.keys() & set(_READ[one])][:1]


def _hidden(part: dict[str, Any]) -> set[str]:
    """Keywords that are read, but not with what stands beside them or not with their value."""
    hidden: set[str] = set()
    if "items" in part:
        hidden.add("prefixItems")
    if not set(part.get("required", ())) <= part.get("properties", {}).keys():
        hidden.add("required")
    if "pattern" in part:
        hidden |= {"format", "minLength", "maxLength"}
        if not _PATTERNS.fullmatch(str(part["pattern"])):
            hidden.add("pattern")
    if "format" in part:
        hidden |= {"minLength", "maxLength"}
        if not _FORMATS.fullmatch(str(part["format"])):
            hidden.add("format")
    return hidden
