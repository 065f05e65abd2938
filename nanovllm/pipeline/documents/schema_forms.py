"""A JSON schema in the forms in which models are told what to extract: NuExtract's templates, and empty values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from itertools import islice
from typing import Any

from nanovllm.pipeline.documents.fields import resolved
from nanovllm.pipeline.documents.json_spans import escaped

_FORMATS = {"email": "email-address", "uri": "url"}
_WITHOUT_TIME = {"date": "date-time", "time": "date-time"}
TEXT = "string"


def nuextract_template(schema: Mapping[str, Any], types: Set[str]) -> Any:
    """``schema`` as a template of NuExtract: the value's own structure, with types for its leaves.

    ``types`` are those that the model knows beside text; a leaf of another one is text. A choice of texts is the list
    of them, and an array of such a choice a list in a list. Of alternatives the first that is not null counts, beside
    what stands around them; a schema within itself is text.
    """
    return _template(schema, schema, types, frozenset())


def _template(schema: Any, root: Any, types: Set[str], above: frozenset[int]) -> Any:
    schema, above = _merged(schema, root, above)
    choice = [value for value in schema.get("enum", ()) if value is not None]
    if choice and all(isinstance(value, str) for value in choice):
        return choice
    if "properties" in schema:
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
    schema, above = _merged(schema, root, above)
    if "properties" in schema:
        return {name: _empty(part, root, above) for name, part in schema["properties"].items()}
    return [_empty(schema.get("items", {}), root, above)] if _kind(schema) == "array" else ""


def unshown(schema: Mapping[str, Any]) -> Iterator[str]:
    """JSON pointers of values that neither form can show: objects without named fields, tuples, a whole without any."""
    merged, _ = _merged(schema, schema, frozenset())
    if "properties" not in merged and _kind(merged) not in ("array", "object"):
        yield ""
    else:
        yield from _unshown(schema, schema, "", frozenset())


def _unshown(schema: Any, root: Any, pointer: str, above: frozenset[int]) -> Iterator[str]:
    schema, above = _merged(schema, root, above)
    if "properties" in schema:
        for name, part in schema["properties"].items():
            yield from _unshown(part, root, f"{pointer}/{escaped(name)}", above)
    elif _kind(schema) == "object" or schema.get("prefixItems"):
        yield pointer
    elif _kind(schema) == "array":
        yield from _unshown(schema.get("items", {}), root, f"{pointer}/0", above)


def _merged(schema: Any, root: Any, above: frozenset[int]) -> tuple[dict[str, Any], frozenset[int]]:
    """``schema`` with its ``allOf`` and the alternative that counts, and ``above`` with them; empty within itself."""
    schema = resolved(schema, root)
    if not schema or id(schema) in above:
        return {}, above
    above |= {id(schema)}
    merged = dict(schema)
    stated = merged.pop("properties", None)
    properties = dict(stated) if isinstance(stated, dict) else {}
    for part in _parts(schema, root):
        more, above = _merged(part, root, above)
        for name, one in more.pop("properties", {}).items():
            properties[name] = {"allOf": [properties[name], one]} if name in properties else one
        merged = {**more, **merged}
    if properties:
        merged["properties"] = properties
    return merged, above


def _parts(schema: Mapping[str, Any], root: Any) -> Iterator[Any]:
    yield from schema.get("allOf", ())
    for name in ("anyOf", "oneOf"):
        known = (one for one in schema.get(name, ()) if resolved(one, root).get("type") != "null")
        yield from islice(known, 1)


def _kind(schema: Mapping[str, Any]) -> str:
    """The type of a value; of several the first that is not null."""
    stated = schema.get("type")
    kinds = stated if isinstance(stated, list) else [stated]
    return next((str(kind) for kind in kinds if kind not in (None, "null")), TEXT)
