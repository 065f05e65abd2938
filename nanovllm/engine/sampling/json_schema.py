"""Rewrite what llguidance does not know about JSON Schema into what it does, where that is exact.

What cannot be rewritten stays as it is, and llguidance refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any
from urllib.parse import quote, unquote

from pydantic_core import SchemaError, SchemaValidator, core_schema

from nanovllm.engine.sampling.exclusive_branches import Exclusion
from nanovllm.engine.sampling.schema_formats import with_enforced_format

# Keywords whose value is a schema, a list of schemas, or schemas by name. What else a schema holds (`enum`, `const`,
# `default`, …) is data, which may look like a schema.
NESTED = frozenset(
    {"additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then"}
)
BRANCHES = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})
NAMED = frozenset({"$defs", "definitions", "patternProperties", "properties"})
CONDITIONS = ("dependencies", "dependentRequired", "dependentSchemas")

# Each is a choice of its own, and a grammar holds every combination of choices.
_MAXCONDITIONS = 4
_MAX_ALTERNATIVES = 8


# OpenAI's `response_format` has the schema in an object of its own.
_WRAPPER = frozenset({"name", "description", "schema", "strict"})

# pydantic's Decimal. llguidance has no look-ahead, which here only asks for a digit.
_PATTERNS = {r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?(\d+\.?\d*|\.\d+)$"}

# Values with which a keyword asserts nothing.
_IDLE: dict[str, tuple[Any, ...]] = {
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "exclusiveMaximum": (False,),  # draft 4
    "exclusiveMinimum": (False,),
    "not": (False,),
    "patternProperties": ({},),
    "propertyNames": (True, {}, {"type": "string"}),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "uniqueItems": (False,),
}


def unwrapped(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema inside OpenAI's ``{"name", "strict", "schema"}`` or ``{"type": "json_schema", "json_schema"}``."""
    inner = schema.get("json_schema")
    if schema.get("type") == "json_schema" and isinstance(inner, dict):
        schema = inner
    inner = schema.get("schema")
    return inner if isinstance(inner, dict) and "name" in schema and schema.keys() <= _WRAPPER else schema


def enforceable(schema: Any) -> Any:
    """The same schema for llguidance: without what asserts nothing, with conditions on a property as choices.

    Raises RecursionError for one that is nested too deeply.
    """
    schema = _without_anchors(schema)
    return _enforceable(schema, _Document(schema, Exclusion(partial(resolve, schema))))


@dataclass(frozen=True)
class _Document:
    root: Any
    exclusion: Exclusion


def subschemas(schema: Any, path: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    """All schemas inside ``schema`` that are objects, with their JSON pointers, itself first."""
    if not isinstance(schema, dict):
        return
    yield path, schema
    for key, value in schema.items():
        if key in NAMED and isinstance(value, dict):
            for name, part in value.items():
                yield from subschemas(part, f"{path}/{key}/{name.replace('~', '~0').replace('/', '~1')}")
        elif key in BRANCHES and isinstance(value, list):
            for number, part in enumerate(value):
                yield from subschemas(part, f"{path}/{key}/{number}")
        elif key in NESTED:
            yield from subschemas(value, f"{path}/{key}")


def resolve(root: Any, ref: str) -> Any:
    """What a reference inside ``root`` names; None where it names nothing, or something outside."""
    if ref != "#" and not ref.startswith("#/"):
        return None
    found = root
    for name in ref[1:].split("/")[1:]:
        key = unquote(name).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(key)
        elif isinstance(found, list) and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found


def _without_anchors(schema: Any) -> Any:
    """The same with JSON pointers for references to anchors: llguidance 1.9 knows those of draft 2020 alone."""
    anchors: dict[str, str] = {}
    for path, part in subschemas(schema):
        names = [part.get("$anchor"), part.get("$dynamicAnchor"), part.get("$id"), part.get("id")]
        anchors |= {name.removeprefix("#"): path for name in names[:2] if isinstance(name, str)}
        anchors |= {name[1:]: path for name in names[2:] if isinstance(name, str) and name[:1] == "#"}  # draft 6
    if not anchors:
        return schema
    schema = deepcopy(schema)
    for _, part in subschemas(schema):
        ref = part.get("$ref")
        if isinstance(ref, str) and ref[:1] == "#" and ref[1:] in anchors:
            part["$ref"] = quote(anchors[ref[1:]], safe="#/~")
        for key in ("$anchor", "$dynamicAnchor"):
            part.pop(key, None)
        for key in ("$id", "id"):
            if isinstance(part.get(key), str) and part[key][:1] == "#":
                del part[key]
    return schema


def _enforceable(schema: Any, document: _Document) -> Any:
    if not isinstance(schema, dict):
        return schema
    one_of = schema.get("oneOf")
    rewritten: dict[str, Any] = {}
    for key, value in schema.items():
        if any(value == idle and type(value) is type(idle) for idle in _IDLE.get(key, ())):
            continue
        if key in NAMED and isinstance(value, dict):
            rewritten[key] = {name: _enforceable(part, document) for name, part in value.items()}
        elif key in BRANCHES and isinstance(value, list):
            rewritten[key] = [_enforceable(part, document) for part in value]
        elif key in NESTED:
            rewritten[key] = _enforceable(value, document)
        elif key == "pattern" and isinstance(value, str):
            rewritten[key] = _PATTERNS.get(value, value)
        else:
            rewritten[key] = value
    rewritten = with_enforced_format(rewritten)
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if rewritten.get(exclusive) is True:  # draft 4, which llguidance reads over
            del rewritten[exclusive]
            if bound in rewritten:
                rewritten[exclusive] = rewritten.pop(bound)
    _take_property_names(rewritten, document.root)
    _share_patterns(rewritten)
    choices = [choice for key in CONDITIONS for choice in _take_conditions(rewritten, key, document)]
    choices += _take_exclusive_properties(rewritten)
    if "oneOf" in rewritten and isinstance(one_of, list):
        beside = {key: value for key, value in schema.items() if key != "oneOf"}
        if document.exclusion.of_all(one_of, beside):
            choices.append({"anyOf": rewritten.pop("oneOf")})
    if choices:
        rewritten["allOf"] = [*rewritten.get("allOf", ()), *choices]
    return rewritten


def _take_property_names(schema: dict[str, Any], root: Any) -> None:
    """``propertyNames`` out of an object that names no properties: its names become properties, or its pattern."""
    names = schema.get("propertyNames")
    if isinstance(names, dict) and isinstance(names.get("$ref"), str) and names.keys() == {"$ref"}:
        names = resolve(root, names["$ref"])
    if not isinstance(names, dict) or not {"properties", "patternProperties"}.isdisjoint(schema):
        return
    asserted = {key: value for key, value in names.items() if key not in ("title", "description")}
    if asserted.get("type") == "string":
        del asserted["type"]
    values = schema.get("additionalProperties", True)
    required = schema.get("required", [])
    if "const" in asserted and isinstance(asserted["const"], str) and len(asserted) == 1:
        asserted = {"enum": [asserted["const"]]}
    if asserted.keys() == {"enum"} and _is_names(asserted["enum"]) and _is_names(required):
        if not set(required) <= set(asserted["enum"]):
            return
        schema["properties"] = dict.fromkeys(asserted["enum"], values)
    elif asserted.keys() == {"pattern"} and isinstance(asserted["pattern"], str) and not required:
        schema["patternProperties"] = {asserted["pattern"]: values}
    else:
        return
    del schema["propertyNames"]
    schema["additionalProperties"] = False


def _share_patterns(schema: dict[str, Any]) -> None:
    """Let a property conform to the patterns that match its name; a pattern that is that name alone goes.

    llguidance 1.9 takes the property's schema only, and then waits for a name that such a pattern cannot give.
    """
    properties, patterns = schema.get("properties"), schema.get("patternProperties")
    if not isinstance(properties, dict) or not isinstance(patterns, dict):
        return
    for name, own in properties.items():
        shared = [part for pattern, part in patterns.items() if matches(pattern, name) and part not in (True, {}, own)]
        if shared:
            properties[name] = {"allOf": [own, *shared]}
    left = {
        pattern: part for pattern, part in patterns.items() if pattern not in {f"^{re.escape(n)}$" for n in properties}
    }
    if left:
        schema["patternProperties"] = left
    else:
        del schema["patternProperties"]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of a schema finds itself in ``name``; False for one that Rust's regex crate does not read.

    That crate takes time in proportion to the text. Python's ``re`` tries each way to match: `(?:a?){50}a{50}` has no
    end there, and it holds the interpreter's lock.
    """
    found = _compiled(pattern)
    return found is not None and found.isinstance_python(name)


@lru_cache(maxsize=512)
def _compiled(pattern: str) -> SchemaValidator | None:
    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, regex_engine="rust-regex"))
    except SchemaError:
        return None


def _take_conditions(schema: dict[str, Any], key: str, document: _Document) -> list[dict[str, Any]]:
    """``{a: needs}`` out of ``schema``: either there is no ``a``, or what it needs holds."""
    conditions = schema.get(key)
    if not isinstance(conditions, dict) or len(conditions) > _MAXCONDITIONS:
        return []
    if not all(isinstance(needs, (dict, bool)) or _is_names(needs) for needs in conditions.values()):
        return []
    del schema[key]
    return [
        {
            "anyOf": [
                {"properties": {name: False}},
                {"required": needs} if isinstance(needs, list) else _enforceable(needs, document),
            ]
        }
        for name, needs in conditions.items()
    ]


def _take_exclusive_properties(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """``oneOf`` out of ``schema`` where each branch only requires a property: one is there and the others are not."""
    branches = schema.get("oneOf")
    if not isinstance(branches, list) or not 2 <= len(branches) <= _MAX_ALTERNATIVES:
        return []
    required = [branch["required"] for branch in branches if isinstance(branch, dict) and set(branch) == {"required"}]
    names = [names[0] for names in required if _is_names(names) and len(names) == 1]
    if len(set(names)) < len(branches):
        return []
    del schema["oneOf"]
    # Every branch of the original takes what is no object, and so no single one does.
    choices = [
        {"type": "object", "required": [name], "properties": {other: False for other in names if other != name}}
        for name in names
    ]
    return [{"anyOf": choices}]


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
