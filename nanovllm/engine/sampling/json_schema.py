"""Rewrite what llguidance does not know about JSON Schema into what it does, where that is exact.

What cannot be rewritten stays as it is, and llguidance refuses it.
"""

from __future__ import annotations

from typing import Any

# Keywords whose value is a schema, a list of schemas, or schemas by name. What else a schema holds (`enum`, `const`,
# `default`, …) is data, which may look like a schema.
_NESTED = frozenset(
    {"additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then"}
)
_BRANCHES = frozenset({"allOf", "anyOf", "items", "oneOf", "prefixItems"})
_NAMED = frozenset({"$defs", "definitions", "patternProperties", "properties"})
_CONDITIONS = ("dependencies", "dependentRequired", "dependentSchemas")

# The formats of any draft; every other one asserts nothing.
_FORMATS = frozenset(
    {"color", "date", "date-time", "duration", "email", "host-name", "hostname", "idn-email", "idn-hostname",
     "ip-address", "ipv4", "ipv6", "iri", "iri-reference", "json-pointer", "phone", "regex", "relative-json-pointer",
     "style", "time", "uri", "uri-reference", "uri-template", "utc-millisec", "uuid"}
)  # fmt: skip

# Each is a choice of its own, and a grammar holds every combination of choices.
_MAX_CONDITIONS = 4
_MAX_ALTERNATIVES = 8


def enforceable(schema: Any) -> Any:
    """The same schema for llguidance: without formats that assert nothing, with conditions on a property as choices.

    Raises RecursionError for one that is nested too deeply, and ValueError where llguidance would take a name that
    comes twice for two properties.
    """
    if not isinstance(schema, dict):
        return schema
    _check_least_properties(schema)
    rewritten: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            rewritten[key] = {name: enforceable(part) for name, part in value.items()}
        elif key in _BRANCHES and isinstance(value, list):
            rewritten[key] = [enforceable(part) for part in value]
        elif key in _NESTED:
            rewritten[key] = enforceable(value)
        elif key != "format" or value in _FORMATS:
            rewritten[key] = value
    choices = [choice for key in _CONDITIONS for choice in _take_conditions(rewritten, key)]
    choices += _take_exclusive_properties(rewritten)
    if choices:
        rewritten["allOf"] = [*rewritten.get("allOf", ()), *choices]
    return rewritten


def _check_least_properties(schema: dict[str, Any]) -> None:
    """Raise ValueError where ``minProperties`` asks for several properties whose names are not given."""
    least, required = schema.get("minProperties", 0), schema.get("required", ())
    if not isinstance(least, int) or not isinstance(required, list | tuple):
        return  # llguidance refuses it
    is_closed = schema.get("additionalProperties", True) is False and not schema.get("patternProperties")
    if not is_closed and least > len(set(map(str, required))) + 1:
        raise ValueError(
            f"minProperties is {least} and required names {len(required)}: that the others differ cannot be enforced"
        )


def _take_conditions(schema: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """``{a: needs}`` out of ``schema``: either there is no ``a``, or what it needs holds."""
    conditions = schema.get(key)
    if not isinstance(conditions, dict) or len(conditions) > _MAX_CONDITIONS:
        return []
    if not all(isinstance(needs, (dict, bool)) or _is_names(needs) for needs in conditions.values()):
        return []
    del schema[key]
    return [
        {
            "anyOf": [
                {"properties": {name: False}},
                {"required": needs} if isinstance(needs, list) else enforceable(needs),
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
