"""JSON Schema refusals: what cannot be enforced, by keyword and path, and what to write instead.

llguidance 1.9 refuses most of this too, without a path; it ignores unknown keywords, and takes schemas without a value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from nanovllm.engine.sampling.json_schema import BRANCHES, CONDITIONS, NAMED, NESTED, matches, resolve

ASSERTIONS = (
    NESTED
    | BRANCHES
    | NAMED
    | {"$dynamicRef", "$recursiveRef", "$ref", "const", "contentEncoding", "contentMediaType", "contentSchema", "enum",
       "exclusiveMaximum", "exclusiveMinimum", "format", "maxContains", "maxItems", "maxLength", "maxProperties",
       "maximum", "minContains", "minItems", "minLength", "minProperties", "minimum", "multipleOf", "pattern",
       "required", "type", "unevaluatedItems", "unevaluatedProperties", "uniqueItems", *CONDITIONS}
)  # fmt: skip
_ANNOTATIONS = frozenset(
    {"$anchor", "$comment", "$dynamicAnchor", "$id", "$recursiveAnchor", "$schema", "$vocabulary", "default",
     "deprecated", "description", "discriminator", "example", "examples", "externalDocs", "id", "nullable", "readOnly",
     "title", "writeOnly", "xml"}
)  # fmt: skip
_CLOSE = 0.85

_LOOK_AROUND = re.compile(r"\(\?<?[=!]")

# What to write instead of a keyword that is still there after the rewriting.
_REMEDIES = {
    "$dynamicRef": "write $ref",
    "$recursiveRef": "write $ref",
    "contains": "write prefixItems, or items with minItems",
    "dependencies": "write anyOf with the properties of each case",
    "dependentRequired": "write anyOf with the properties of each case",
    "dependentSchemas": "write anyOf with the properties of each case",
    "if": "write anyOf with the properties of each case",
    "not": "write what is allowed: enum, pattern or anyOf",
    "propertyNames": "write properties or patternProperties with additionalProperties: false",
    "unevaluatedItems": "write items: false behind prefixItems",
    "unevaluatedProperties": "write additionalProperties: false where the properties are",
    "uniqueItems": "leave it out (in pydantic: list for set), and drop repeated items of the answer",
}


def check_schema(schema: Any) -> None:
    """Raise ValueError for what cannot be enforced; ``schema`` is what ``json_schema.enforceable`` returns."""
    for path, part in subschemas(schema):
        _check_keywords(path, part)
        _check_patterns(path, part)
    if not _has_value(schema, _refs_with_values(schema)):
        raise ValueError("no finite value conforms: a $ref leads back to itself, or a required part has no value")


def subschemas(schema: Any, path: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    """All schemas inside ``schema`` that are objects, with their JSON pointers, itself first."""
    if not isinstance(schema, dict):
        return
    yield path, schema
    for key, value in schema.items():
        if key in NAMED and isinstance(value, dict):
            for name, part in value.items():
                yield from subschemas(part, f"{path}/{key}/{name}")
        elif key in BRANCHES and isinstance(value, list):
            for number, part in enumerate(value):
                yield from subschemas(part, f"{path}/{key}/{number}")
        elif key in NESTED:
            yield from subschemas(value, f"{path}/{key}")


def _check_keywords(path: str, schema: dict[str, Any]) -> None:
    for key, remedy in _REMEDIES.items():
        if key in schema:
            raise ValueError(f"{key} at {path} cannot be enforced: {remedy}")
    unknown = [key for key in schema if key not in ASSERTIONS | _ANNOTATIONS and not key.startswith("x-")]
    for key in unknown:
        if close := get_close_matches(key, ASSERTIONS - schema.keys(), 1, _CLOSE):
            raise ValueError(f"{key[:64]!r} at {path} is no keyword: did you mean {close[0]}?")
    if unknown and ASSERTIONS.isdisjoint(schema):
        raise ValueError(f"{unknown[0][:64]!r} at {path} is no keyword of JSON Schema, and nothing else there is one")


def _check_patterns(path: str, schema: dict[str, Any]) -> None:
    patterns = schema.get("patternProperties")
    patterns = patterns if isinstance(patterns, dict) else {}
    own = [schema["pattern"]] if isinstance(schema.get("pattern"), str) else []
    for pattern in (*own, *patterns):
        if _LOOK_AROUND.search(pattern):
            raise ValueError(f"the pattern at {path} looks ahead or behind (`(?=`, `(?!`): write it without")
    properties = schema.get("properties")
    for pattern in patterns:
        for name in properties if isinstance(properties, dict) else ():
            if pattern.endswith("$") and matches(pattern, name):
                raise ValueError(
                    f"patternProperties {pattern[:64]!r} at {path} matches {name[:64]!r}, which properties has too: "
                    "write a pattern that leaves it out"
                )


_MAX_PASSES = 64
"""Over the references of a schema; a chain of more is not followed to its end."""


def _refs_with_values(schema: Any) -> frozenset[str]:
    """The references of ``schema`` to parts that some finite value conforms to: the least fixed point."""
    targets = {}
    for _, part in subschemas(schema):
        ref = part.get("$ref")
        if isinstance(ref, str) and (target := resolve(schema, ref)) is not None:
            targets[ref] = target
    known: frozenset[str] = frozenset(ref for ref in _all_refs(schema) if ref not in targets)
    for _ in range(_MAX_PASSES):
        more = {ref for ref, target in targets.items() if ref not in known and _has_value(target, known)}
        if not more:
            return known
        known |= more
    return known | targets.keys()


def _all_refs(schema: Any) -> Iterator[str]:
    for _, part in subschemas(schema):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]


def _has_value(schema: Any, known: frozenset[str]) -> bool:
    """Whether a finite value can conform to ``schema``, whose references among ``known`` have one."""
    if not isinstance(schema, dict):
        return schema is not False
    if isinstance(schema.get("$ref"), str) and schema["$ref"] not in known:
        return False
    if not all(_has_value(part, known) for part in _parts(schema, "allOf")):
        return False
    for key in ("anyOf", "oneOf"):
        if (parts := _parts(schema, key)) and not any(_has_value(part, known) for part in parts):
            return False
    if schema.get("type") in ("object", ["object"]):
        properties = schema.get("properties")
        required = [name for name in _parts(schema, "required") if isinstance(name, str)]
        return not isinstance(properties, dict) or all(_has_value(properties.get(name), known) for name in required)
    least = schema.get("minItems", 0)
    if schema.get("type") in ("array", ["array"]) and isinstance(least, int) and least > 0:
        first = _parts(schema, "prefixItems")[:least]
        rest = schema.get("items", True) if least > len(first) else True
        return all(_has_value(part, known) for part in (*first, rest))
    return True


def _parts(schema: dict[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []
