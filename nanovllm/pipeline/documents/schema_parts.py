"""Schema splitting: a schema with more leaves than an output holds, as parts by its branches; merging of their values.

The parts' requests share one prompt, which the prefix cache holds; each answer is confined to its own part. The merged
value is validated against the whole schema: parts know nothing of one another.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nanovllm.engine.sampling.json_schema import unwrapped
from nanovllm.engine.sampling.schema_refusals import ASSERTIONS, subschemas
from nanovllm.errors import UnsupportedConstraint
from nanovllm.messages.encoding import MAX_INTEGER
from nanovllm.pipeline.documents.fields import resolved
from nanovllm.pipeline.documents.json_spans import escaped

# Beside these an object's properties depend on one another, and stay in one part.
_SEPARABLE = frozenset(
    {"$anchor", "$comment", "$defs", "$id", "$schema", "additionalProperties", "default", "definitions", "description",
     "examples", "properties", "required", "title", "type"}
)  # fmt: skip
# What holds for one object beside another schema.
_COMBINING = frozenset(
    {"allOf", "dependencies", "dependentSchemas", "else", "if", "not", "then", "unevaluatedProperties"}
)


def count_leaves(schema: Any, root: Any = None) -> int:
    """Leaves of the largest value with one item an array: scalars, of alternatives those with the most leaves.

    A reference that leads back into itself counts one.
    """
    return _count(schema, schema if root is None else root, {})


def _count(schema: Any, root: Any, known: dict[int, int]) -> int:
    schema = resolved(schema, root)
    if not schema or id(schema) in known:
        return known.get(id(schema), 1)
    known[id(schema)] = 1

    def count(parts: Iterable[Any]) -> list[int]:
        return [_count(part, root, known) for part in parts]

    items = [*schema.get("prefixItems", ()), *([schema["items"]] if isinstance(schema.get("items"), dict) else ())]
    own = sum(count([*schema.get("properties", {}).values(), *items, *schema.get("allOf", ())]))
    chosen = max(count([*schema.get("anyOf", ()), *schema.get("oneOf", ())]), default=0)
    known[id(schema)] = max(1, own + chosen)
    return known[id(schema)]


def split_schema(schema: Mapping[str, Any], max_leaves: int) -> list[dict[str, Any]]:
    """``schema`` as parts of at most ``max_leaves`` leaves each, in its own order; one part where it fits whole.

    A branch that does not fit is split by its own properties where it is an object that must be there. Parts are
    closed: properties that the schema does not name, which it may allow, are not asked for. Everything within is as
    ``for_extraction`` makes it.

    Raises:
        UnsupportedConstraint: a branch has more leaves and cannot be split.
    """
    whole = for_extraction(unwrapped(dict(schema)))
    root = resolved(whole, whole)
    if count_leaves(whole) <= max_leaves:
        return [whole]
    # What references name must be in every part; one into a branch would lead nowhere in most of them.
    for path, part in subschemas(whole):
        ref = part.get("$ref")
        if isinstance(ref, str) and not ref.startswith(("#/$defs/", "#/definitions/")):
            raise UnsupportedConstraint(f"$ref at {path} is {ref[:64]!r}: a schema that is split refers to $defs only")
    shared: dict[str, Any] = {key: whole[key] for key in ("$schema", "$defs", "definitions") if key in whole}
    return [{**shared, **part} for part in _split(root, whole, max_leaves, "#")]


def for_extraction(schema: Mapping[str, Any]) -> dict[str, Any]:
    """``schema`` narrowed to what a record carries and an extraction asks for; its values are values of ``schema``.

    - Numbers without bounds of their own get those of messages, 2^53 to each side: guidance lets a model write digits
      until its tokens end, and ``1e999``, which are valid under the schema and refused by readers of doubles.
    - Objects are closed, where the schema says nothing about other properties: guidance lets a model invent names, the
      same one twice too. Not where parts of a schema hold for one object together (``allOf``, or a ``$ref`` with
      keywords beside it), as each would forbid the properties of the others.
    """
    narrowed = copy.deepcopy(dict(schema))
    parts = [part for _, part in subschemas(narrowed)]
    is_separate = not any(_COMBINING & part.keys() or _is_extended(part) for part in parts)
    for part in parts:
        types = part.get("type")
        if not {"integer", "number"}.isdisjoint([types] if isinstance(types, str) else types or ()):
            if "exclusiveMinimum" not in part:
                part.setdefault("minimum", -MAX_INTEGER)
            if "exclusiveMaximum" not in part:
                part.setdefault("maximum", MAX_INTEGER)
        if is_separate and _names_all_properties(part):
            part.setdefault("additionalProperties", False)
    return narrowed


def merge_parts(values: Sequence[Any]) -> Any:
    """The values of a schema's parts as one; a part without an answer is left out by the caller.

    Raises:
        ValueError: two parts have a value in one place, which parts of one schema never have.
    """
    merged: dict[str, Any] = {}
    for value in values:
        if len(values) == 1:
            return value
        _merge_into(merged, value, "")
    return merged


def _split(schema: dict[str, Any], root: Any, max_leaves: int, path: str) -> list[dict[str, Any]]:
    _check_separable(schema, root, max_leaves, path)
    required = schema.get("required", [])
    parts: list[dict[str, Any]] = []
    left = 0

    def add(name: str, branch: Any, num_leaves: int) -> None:
        nonlocal left
        if num_leaves > left or not parts or name in parts[-1]["properties"]:
            kept: dict[str, Any] = {key: schema[key] for key in ("title", "description") if key in schema}
            parts.append({**kept, "type": "object", "properties": {}, "required": [], "additionalProperties": False})
            left = max_leaves
        parts[-1]["properties"][name] = branch
        if name in required:
            parts[-1]["required"].append(name)
        left -= num_leaves

    for name, branch in schema["properties"].items():
        num_leaves = count_leaves(branch, root)
        if num_leaves <= max_leaves:
            add(name, branch, num_leaves)
            continue
        below = f"{path}/properties/{escaped(name)}"
        inner = resolved(branch, root)
        if name not in required and inner.get("required"):
            # One part could leave it out and another fill it in, without what it requires.
            raise UnsupportedConstraint(
                f"{below} has {num_leaves} leaves and is optional: require it, or raise max_leaves above {max_leaves}"
            )
        for piece in _split(inner, root, max_leaves, below):
            add(name, piece, count_leaves(piece, root))
    return parts


def _names_all_properties(schema: dict[str, Any]) -> bool:
    """Whether what the schema demands of an object is among the properties that it names."""
    named = schema.get("properties")
    if not named or not {"patternProperties", "propertyNames", "minProperties"}.isdisjoint(schema):
        return False
    return set(schema.get("required", ())) <= named.keys()


def _is_extended(schema: dict[str, Any]) -> bool:
    """Whether keywords beside a reference or a choice hold for the same object."""
    beside = ASSERTIONS & schema.keys() - {"$defs", "$ref", "anyOf", "definitions", "oneOf"}
    return bool(beside) and not {"$ref", "anyOf", "oneOf"}.isdisjoint(schema)


def _check_separable(schema: dict[str, Any], root: Any, max_leaves: int, path: str) -> None:
    others = sorted(ASSERTIONS & schema.keys() - _SEPARABLE)
    is_object = schema.get("type", "object") == "object" and bool(schema.get("properties"))
    if is_object and not others and isinstance(schema.get("additionalProperties", True), bool):
        return
    reason = f"because of {others[0]}" if others else "because it is no object with properties alone"
    raise UnsupportedConstraint(
        f"{path} has {count_leaves(schema, root)} leaves and cannot be split {reason}: "
        f"raise max_leaves above {max_leaves}, or write it as an object of branches"
    )


def _merge_into(merged: dict[str, Any], value: Any, pointer: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"a part's value at {pointer!r} is no object")
    for name, item in value.items():
        below = f"{pointer}/{escaped(name)}"
        if name not in merged:
            merged[name] = _copied(item)
        elif isinstance(merged[name], dict):
            _merge_into(merged[name], item, below)
        else:
            raise ValueError(f"two parts have a value at {below!r}: they are not parts of one schema")


def _copied(value: Any) -> Any:
    """``value`` with objects of its own, into which later parts are merged; leaves and arrays are shared."""
    return {name: _copied(item) for name, item in value.items()} if isinstance(value, dict) else value
