"""Comparison of a value with its truth: the outcome of each leaf, and of each list's rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from nanovllm.pipeline.documents.evaluation.leaves import is_absent, is_equal, is_exact
from nanovllm.pipeline.documents.evaluation.row_matching import MatchedRows, match_rows
from nanovllm.pipeline.documents.json_spans import escaped

Outcome = Literal["exact", "normalised", "wrong", "missing", "invented", "absent"]
RIGHT: frozenset[Outcome] = frozenset({"exact", "normalised"})


@dataclass(frozen=True)
class Place:
    """A place in both values: ``field`` has ``*`` for the index of any row; the pointers are each value's own."""

    field: str = ""
    truth: str = ""
    result: str = ""

    def property(self, name: str) -> Place:
        """The place of a property in an object that stands here."""
        part = f"/{escaped(name)}"
        return Place(self.field + part, self.truth + part, self.result + part)

    def row(self, truth: int | None, result: int | None) -> Place:
        """The place of a row in a list that stands here; None where one side has no such row (``-`` is no index)."""
        pointers = (f"{own}/{'-' if at is None else at}" for own, at in ((self.truth, truth), (self.result, result)))
        return Place(f"{self.field}/*", *pointers)


@dataclass(frozen=True)
class LeafOutcome:
    """One leaf. ``missing``: should be there and is not; ``invented``: is and should not; ``absent``: in neither."""

    place: Place
    outcome: Outcome


@dataclass(frozen=True)
class ListOutcome:
    """One list that has rows in the truth or in the result; ``equal_rows`` are pairs without any difference."""

    field: str
    rows: MatchedRows
    equal_rows: int


@dataclass
class Comparison:
    """A value beside its truth."""

    leaves: list[LeafOutcome] = field(default_factory=list)
    lists: list[ListOutcome] = field(default_factory=list)

    def is_right(self, outcomes: frozenset[Outcome] = RIGHT) -> bool:
        """Whether each leaf has one of ``outcomes`` or is absent in both, and all lists have their rows in order."""
        return all(one.outcome in outcomes or one.outcome == "absent" for one in self.leaves) and all(
            len(one.rows.pairs) == one.rows.truth_rows == one.rows.result_rows and not one.rows.inversions
            for one in self.lists
        )


def compare(truth: Any, value: Any) -> Comparison:
    """Compare ``value`` with ``truth``, leaf by leaf.

    Where one has an object or a list and the other something else, the truth's leaves are missing and the value's are
    invented. Leaves of rows without a partner are missing or invented too.
    """
    comparison = Comparison()
    comparison.leaves.extend(_leaves(truth, value, Place(), comparison.lists))
    return comparison


def _leaves(truth: Any, value: Any, place: Place, lists: list[ListOutcome]) -> Iterator[LeafOutcome]:
    kinds = {_kind(one) for one in (truth, value) if not is_absent(one)}
    if not kinds:
        yield LeafOutcome(place, "absent")
    elif kinds == {dict}:
        truth, value = truth or {}, value or {}
        for name in [*truth, *(name for name in value if name not in truth)]:
            yield from _leaves(_item(truth, name), _item(value, name), place.property(name), lists)
    elif kinds == {list}:
        yield from _rows(truth or [], value or [], place, lists)
    elif len(kinds) > 1:
        yield from _leaves(truth, None, place, lists)
        yield from _leaves(None, value, place, lists)
    else:
        yield LeafOutcome(place, _outcome(truth, value))


def _rows(truth: list[Any], value: list[Any], place: Place, lists: list[ListOutcome]) -> Iterator[LeafOutcome]:
    rows = match_rows(truth, value)
    equal = 0
    for one, other in rows.pairs:
        inner: list[ListOutcome] = []
        found = Comparison(list(_leaves(truth[one], value[other], place.row(one, other), inner)), inner)
        equal += found.is_right()
        lists.extend(inner)
        yield from found.leaves
    for one in rows.missing:
        yield from _leaves(truth[one], None, place.row(one, None), lists)
    for other in rows.invented:
        yield from _leaves(None, value[other], place.row(None, other), lists)
    lists.append(ListOutcome(place.field, rows, equal))


def _outcome(truth: Any, value: Any) -> Outcome:
    if is_absent(value):
        return "missing"
    if is_absent(truth):
        return "invented"
    if is_exact(truth, value):
        return "exact"
    return "normalised" if is_equal(truth, value) else "wrong"


def _kind(value: Any) -> type:
    return type(value) if isinstance(value, (dict, list)) else object


def _item(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None
