"""JSON Schema refusals: what cannot be enforced, by keyword and path, and what to write instead.

llguidance 1.9 refuses most of this too, without a path; it ignores unknown keywords, and takes schemas without a value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from nanovllm.engine.sampling.json_schema import BRANCHES, CONDITIONS, NAMED, NESTED, matches, resolve, subschemas
from nanovllm.engine.sampling.schema_formats import REFUSED, meant

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
_OTHER_NAMES = {"bool": "boolean", "dict": "object", "float": "number", "int": "integer", "list": "array",
                "none": "null", "str": "string", "text": "string"}  # fmt: skip
"""Of types, in other languages."""
_SHOWN_CHARS = 64

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


_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")


def check_schema(schema: Any) -> None:
    """Raise ValueError for what cannot be enforced; ``schema`` is what ``json_schema.enforceable`` returns."""
    parts = list(subschemas(schema))
    for path, part in parts:
        _check_keywords(path, part)
        _check_values(path, part)
        _check_least_properties(path, part)
        _check_patterns(path, part)
    known = _refs_with_values(schema)
    if not _has_value(schema, known):
        last = [path for path, part in parts if not _has_value(part, known)][-1]
        raise ValueError(
            f"no finite value conforms to what is at {last}: a $ref leads back to itself, or a required part has no "
            "value; write anyOf with a case that ends, or do not require it"
        )


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


def _check_values(path: str, schema: dict[str, Any]) -> None:
    types = schema.get("type")
    for name in types if isinstance(types, list) else [types] if "type" in schema else []:
        if name not in _TYPES:
            close = get_close_matches(str(name).lower(), (*_TYPES, *_OTHER_NAMES), 1, 0.6)
            hint = f"did you mean {_OTHER_NAMES.get(close[0], close[0])}?" if close else f"write {', '.join(_TYPES)}"
            raise ValueError(f"type at {path} is {_shown(name)}, which is none: {hint}")
    name = schema.get("format")
    if name in REFUSED if isinstance(name, str) else "format" in schema:
        raise ValueError(f"format {_shown(name)} at {path} cannot be enforced: write pattern, or leave it out")
    if isinstance(name, str) and (known := meant(name)) is not None:
        raise ValueError(f"format {_shown(name)} at {path} is none: did you mean {known}?")
    step = schema.get("multipleOf", 1)
    if not isinstance(step, int | float) or isinstance(step, bool) or step <= 0:  # llguidance takes negative ones
        raise ValueError(f"multipleOf at {path} is {_shown(step)}: write a number above 0")


def _shown(value: Any) -> str:
    return json.dumps(value)[:_SHOWN_CHARS]


def _check_least_properties(path: str, schema: dict[str, Any]) -> None:
    """Raise ValueError where `minProperties` asks for several properties whose names are not given."""
    least, required = schema.get("minProperties", 0), schema.get("required", [])
    if not isinstance(least, int) or not isinstance(required, list):
        return  # llguidance refuses it
    is_closed = schema.get("additionalProperties", True) is False and not schema.get("patternProperties")
    if not is_closed and least > len(set(map(str, required))) + 1:
        # llguidance would count a name that comes twice as two.
        raise ValueError(
            f"minProperties is {least} at {path} and required names {len(required)}: that the others differ cannot be "
            "enforced; name them in required, or write additionalProperties: false"
        )


def _check_patterns(path: str, schema: dict[str, Any]) -> None:
    patterns = schema.get("patternProperties")
    properties = schema.get("properties")
    for pattern in patterns if isinstance(patterns, dict) else ():
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
