"""A JSON schema in the forms in which models are told what to extract: NuExtract's templates, and empty values."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from nanovllm.pipeline.documents.fields import resolved

_FORMATS = {"email": "email-address", "uri": "url"}
_WITHOUT_TIME = {"date": "date-time", "time": "date-time"}
TEXT = "string"


def nuextract_template(schema: Mapping[str, Any], types: Set[str]) -> Any:
    """``schema`` as a template of NuExtract: the value's own structure, with types for its leaves.

    ``types`` are those that the model knows beside text; a leaf of another one is text. A choice of texts is the list
    of them, and an array of such a choice a list in a list. Of alternatives the first that is not null counts; a schema
    within itself is text.
    """
    return _template(schema, schema, types, frozenset())


def _template(schema: Any, root: Any, types: Set[str], above: frozenset[int]) -> Any:
    schema = resolved(schema, root)
    if not schema or id(schema) in above:
        return TEXT
    above |= {id(schema)}
    for name in ("anyOf", "oneOf"):
        for chosen in schema.get(name, ()):
            if resolved(chosen, root).get("type") != "null":
                return _template(chosen, root, types, above)
    choice = [value for value in schema.get("enum", ()) if value is not None]
    if choice and all(isinstance(value, str) for value in choice):
        return choice
    if isinstance(schema.get("properties"), dict):
        return {name: _template(part, root, types, above) for name, part in schema["properties"].items()}
    kind = _kind(schema)
    if kind == "array":
        return [_template(schema.get("items", {}), root, types, above)]
    if kind == TEXT:
        kind = str(schema.get("format", TEXT))
        kind = _FORMATS.get(kind, kind)
        kind = kind if kind in types else _WITHOUT_TIME.get(kind, kind)
    return kind if kind in types else TEXT


def empty_values(schema: Mapping[str, Any]) -> Any:
    """A value of ``schema``'s structure whose leaves are empty texts; an array has one item."""
    return _empty(schema, schema, frozenset())


def _empty(schema: Any, root: Any, above: frozenset[int]) -> Any:
    schema = resolved(schema, root)
    if not schema or id(schema) in above:
        return ""
    above |= {id(schema)}
    for name in ("anyOf", "oneOf"):
        for chosen in schema.get(name, ()):
            if resolved(chosen, root).get("type") != "null":
                return _empty(chosen, root, above)
    if isinstance(schema.get("properties"), dict):
        return {name: _empty(part, root, above) for name, part in schema["properties"].items()}
    return [_empty(schema.get("items", {}), root, above)] if _kind(schema) == "array" else ""


def _kind(schema: Mapping[str, Any]) -> str:
    """The type of a value; of several the first that is not null."""
    stated = schema.get("type")
    kinds = stated if isinstance(stated, list) else [stated]
    return next((str(kind) for kind in kinds if kind not in (None, "null")), TEXT)
