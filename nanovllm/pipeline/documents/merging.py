"""Merging of pages: the values of a document's pages as one value, by the route's rule.

- ``per_document``: one value of the schema. Of a leaf the first page's value that is there and not null; where other
  pages differ, that is a conflict, which is reported and not decided. Arrays are one after the other in page order; an
  item that an earlier page has too is left out, as of a list of parties that stands on every page.
- ``per_row``: the same, but every item stays: the rows of a table that goes over pages may be equal.
- ``per_page``: an array, with one value a page.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nanovllm.messages.document_record import Conflict, FieldMeta
from nanovllm.pipeline.documents.fields import missing_properties
from nanovllm.pipeline.documents.json_spans import escaped, leaves

_VALUES = frozenset({"const", "enum", "default", "examples"})
"""Keywords whose values are no schemas."""

MergeRule = Literal["per_document", "per_page", "per_row"]


@dataclass(frozen=True)
class MergedPages:
    """The merged value; by its leaves' JSON pointers the page that each came from, and the pointer there; conflicts."""

    value: Any
    origins: Mapping[str, tuple[int, str]]
    conflicts: tuple[Conflict, ...] = ()


def merge_pages(values: Mapping[int, Any], rule: MergeRule) -> MergedPages:
    """The values of one page or more, by page number, merged. The caller leaves out pages without an answer."""
    if not values:
        raise ValueError("no page has a value: a document without one has no value either")
    if rule == "per_page":
        origins = {
            f"/{index}{pointer}": (page, pointer)
            for index, page in enumerate(sorted(values))
            for pointer, _ in leaves(values[page])
        }
        return MergedPages([values[page] for page in sorted(values)], origins)
    merge = _Merge(keeps_equal_items=rule == "per_row")
    first, *others = sorted(values)
    value = merge.taken(values[first], first, "", "")
    for page in others:
        value = merge.merged(value, values[page], page, "", "")
    conflicts = tuple(Conflict(path=path, pages=tuple(pages)) for path, pages in sorted(merge.conflicts.items()))
    return MergedPages(value, {pointer: merge.origins[pointer] for pointer, _ in leaves(value)}, conflicts)


def merged_schema(schema: Mapping[str, Any], rule: MergeRule) -> dict[str, Any]:
    """The schema of what ``merge_pages`` returns for values of ``schema``."""
    if rule != "per_page":
        return dict(schema)
    # References are from the root, which moves.
    return {"type": "array", "items": _moved(schema, "#/items")}


def _moved(schema: Any, root: str) -> Any:
    """``schema`` with its references (``#``, ``#/…``) for a place at ``root``."""
    if isinstance(schema, list):
        return [_moved(part, root) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: part if name in _VALUES else _moved(part, root) for name, part in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = root + reference[1:]
    return moved


def merged_fields(
    merged: MergedPages, fields: Mapping[int, Mapping[str, FieldMeta]], schema: Mapping[str, Any] | None = None
) -> dict[str, FieldMeta]:
    """The fields of a merged value, from those of each page's value; a field without evidence names its page too.

    ``schema``: of the merged value, for the properties that no page has.
    """
    found = {}
    for pointer, (page, origin) in merged.origins.items():
        one = fields[page][origin]
        found[pointer] = one if one.page is not None else one.model_copy(update={"page": page})
    absent = FieldMeta(source="absent")
    return found | dict.fromkeys(missing_properties(merged.value, schema), absent)


@dataclass
class _Merge:
    keeps_equal_items: bool
    origins: dict[str, tuple[int, str]] = field(default_factory=dict)
    conflicts: dict[str, list[int]] = field(default_factory=dict)

    def merged(self, value: Any, other: Any, page: int, pointer: str, origin: str) -> Any:
        """``value``, at ``pointer``, with the page's own value, which stands at ``origin`` there."""
        if other is None:
            return value
        if value is None:
            return self.taken(other, page, pointer, origin)
        if isinstance(value, dict) and isinstance(other, dict):
            return self._objects(value, other, page, pointer, origin)
        if isinstance(value, list) and isinstance(other, list):
            return self._arrays(value, other, page, pointer, origin)
        if _key(value) != _key(other):
            self.conflicts.setdefault(pointer, []).append(page)
        return value

    def taken(self, value: Any, page: int, pointer: str, origin: str) -> Any:
        """``value`` of a page, whose leaves come from there."""
        for below, _ in leaves(value):
            self.origins[pointer + below] = (page, origin + below)
        return value

    def _objects(self, value: dict[str, Any], other: dict[str, Any], page: int, pointer: str, origin: str) -> Any:
        found = dict(value)
        for name, item in other.items():
            places = (f"{pointer}/{escaped(name)}", f"{origin}/{escaped(name)}")
            found[name] = (
                self.merged(value[name], item, page, *places) if name in value else self.taken(item, page, *places)
            )
        return found

    def _arrays(self, value: list[Any], other: list[Any], page: int, pointer: str, origin: str) -> list[Any]:
        found = list(value)
        earlier = set() if self.keeps_equal_items else {_key(item) for item in value}
        for index, item in enumerate(other):
            if _key(item) not in earlier:
                found.append(self.taken(item, page, f"{pointer}/{len(found)}", f"{origin}/{index}"))
        return found


def _key(value: Any) -> Hashable:
    """Equal for equal JSON values; for Python ``True`` equals 1, for JSON it does not."""
    if isinstance(value, dict):
        return frozenset((name, _key(item)) for name, item in value.items())
    if isinstance(value, list):
        return tuple(_key(item) for item in value)
    return (bool, value) if isinstance(value, bool) else value
