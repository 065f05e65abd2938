"""Exclusive branches of JSON Schema: which parts of a `oneOf` no value can conform to at once.

There `oneOf` and `anyOf` mean the same. llguidance 1.9 sees this of types, and not of pydantic's discriminated unions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

_TYPES = frozenset({"array", "boolean", "fraction", "integer", "null", "object", "string"})
_MAX_DEPTH = 8  # references lead in circles
_Schemas = list[dict[str, Any]]


@dataclass
class Exclusion:
    """Comparison of branches, within a number of steps; behind the last none is seen to exclude another.

    Args:
        resolve: what a reference names.
    """

    resolve: Callable[[str], Any]
    steps_left: int = 200_000

    def of_all(self, branches: list[Any], beside: dict[str, Any]) -> bool:
        """Whether each value that conforms to ``beside`` conforms to one of ``branches`` at most."""
        whole = [{"allOf": [branch, beside]} if isinstance(branch, dict) else branch for branch in branches]
        return all(self._exclude(left, right, _MAX_DEPTH) for left, right in combinations(whole, 2))

    def _exclude(self, left: Any, right: Any, depth: int) -> bool:
        if left is False or right is False:
            return True
        lefts, rights = list(self._conjuncts(left, depth)), list(self._conjuncts(right, depth))
        self.steps_left -= len(lefts) * len(rights)
        return self.steps_left > 0 and all(
            any(self._values_exclude(kind, one, other) for one in lefts for other in rights)
            or (kind == "object" and self._objects_exclude(lefts, rights, depth))
            for kind in _types(lefts) & _types(rights)
        )

    def _conjuncts(self, schema: Any, depth: int) -> Iterator[dict[str, Any]]:
        """All schemas that what conforms to ``schema`` conforms to: itself, its reference and its ``allOf``."""
        self.steps_left -= 1
        if not isinstance(schema, dict) or depth <= 0 or self.steps_left <= 0:
            return
        yield schema
        if isinstance(schema.get("$ref"), str):
            yield from self._conjuncts(self.resolve(schema["$ref"]), depth - 1)
        parts = schema.get("allOf")
        for part in parts if isinstance(parts, list) else ():
            yield from self._conjuncts(part, depth - 1)

    def _values_exclude(self, kind: str, left: dict[str, Any], right: dict[str, Any]) -> bool:
        """Whether no value of the type ``kind`` conforms to both, by its listed values or its size."""
        values, others = _values(left), _values(right)
        if values is not None and others is not None:
            self.steps_left -= len(values) * len(others)
            return self.steps_left > 0 and not any(
                value == other and _type(value) == _type(other) == kind for value in values for other in others
            )
        if kind in ("integer", "fraction"):
            return _is_below(left, right) or _is_below(right, left)
        if kind not in ("string", "array"):
            return False
        most, least = ("maxLength", "minLength") if kind == "string" else ("maxItems", "minItems")
        return any(
            _number(one, most, _INFINITE) < _number(other, least, 0) for one, other in ((left, right), (right, left))
        )

    def _objects_exclude(self, lefts: _Schemas, rights: _Schemas, depth: int) -> bool:
        """Whether a property that one side requires has no value that conforms to both, or one side forbids it."""
        required = {name for schema in lefts + rights for name in _required(schema)}
        self.steps_left -= len(required) * len(lefts + rights)
        return any(
            any(_forbids(schema, name) for schema in lefts + rights)
            or any(
                self._exclude(_properties(one)[name], _properties(other)[name], depth - 1)
                for one in lefts
                for other in rights
                if name in _properties(one) and name in _properties(other)
            )
            for name in sorted(required)
            if self.steps_left > 0
        )


_INFINITE = float("inf")


def _types(conjuncts: _Schemas) -> frozenset[str]:
    """The types of values that may conform; a number is an integer or has a fraction."""
    types = _TYPES
    for schema in conjuncts:
        if "type" in schema:
            named = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            types &= {str(name) for name in named} | ({"fraction", "integer"} if "number" in named else set())
        if (values := _values(schema)) is not None:
            types &= {_type(value) for value in values}
    return types


def _type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) or value.is_integer() else "fraction"
    kinds: tuple[tuple[type, str], ...] = ((str, "string"), (list, "array"), (dict, "object"))
    return next((kind for python, kind in kinds if isinstance(value, python)), "null")


def _values(schema: dict[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _required(schema: dict[str, Any]) -> list[str]:
    names = schema.get("required")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _forbids(schema: dict[str, Any], name: str) -> bool:
    is_closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    return _properties(schema).get(name, not is_closed) is False


def _is_below(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether every number of ``left`` is less than every one of ``right``."""
    high, low = _number(left, "maximum", _INFINITE), _number(right, "minimum", -_INFINITE)
    below = _number(left, "exclusiveMaximum", _INFINITE)
    above = _number(right, "exclusiveMinimum", -_INFINITE)
    return high < low or below <= low or high <= above or below <= above


def _number(schema: dict[str, Any], key: str, default: float) -> float:
    value = schema.get(key, default)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default
