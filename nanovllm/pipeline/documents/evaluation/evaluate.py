"""Evaluation of a run: coverage, rates, fields and lists over all documents of the truth.

A document that is missing or failed counts as wrong everywhere: all leaves of its truth are missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar

from nanovllm.errors import InvalidInput
from nanovllm.messages.document_record import DocumentRecord, PageUse
from nanovllm.pipeline.documents.evaluation.comparison import (
    RIGHT,
    Comparison,
    ListOutcome,
    Outcome,
    compare,
)
from nanovllm.pipeline.documents.evaluation.inputs import Found, Results, Truth, match_documents
from nanovllm.pipeline.documents.evaluation.intervals import McNemar, Ratio, bootstrap, wilson
from nanovllm.pipeline.documents.evidence import has_evidence
from nanovllm.pipeline.documents.json_spans import leaves

EXACT: frozenset[Outcome] = frozenset({"exact"})
Parts = tuple[int, int]
K = TypeVar("K")


@dataclass
class Pages:
    """Pages that should have an answer: ``answered`` have one (blank ones too), ``others`` by what they are instead.

    ``is_known`` is false where nothing says how many there should be: neither truth nor record.
    """

    expected: int = 0
    answered: int = 0
    duplicate: int = 0
    others: Counter[str] = field(default_factory=Counter)
    is_known: bool = True


@dataclass
class FieldScore:
    """Outcomes of all leaves of one field, or of all fields."""

    outcomes: Counter[Outcome] = field(default_factory=Counter)

    def parts(self, which: str, outcomes: frozenset[Outcome] = RIGHT) -> Parts:
        """Count and total of ``precision``, ``recall`` or ``f1``: a wrong leaf is missing and invented at once."""
        right = sum(self.outcomes[one] for one in outcomes)
        both = sum(self.outcomes[one] for one in ("exact", "normalised", "wrong"))
        expected, given = both + self.outcomes["missing"], both + self.outcomes["invented"]
        return _parts(which, right, expected, given)


@dataclass
class ListScore:
    """Rows of all lists of one field, or of all fields."""

    lists: list[ListOutcome] = field(default_factory=list)

    def parts(self, which: str, *, only_equal: bool = False) -> Parts:
        """As of fields; a row is right when it has a partner, or ``only_equal`` when the two do not differ."""
        right = sum(one.equal_rows if only_equal else len(one.rows.pairs) for one in self.lists)
        expected, given = (
            sum(one.rows.truth_rows for one in self.lists),
            sum(one.rows.result_rows for one in self.lists),
        )
        return _parts(which, right, expected, given)

    @property
    def order(self) -> float | None:
        """Kendall's tau of the pairs: 1 in the truth's order, -1 reversed."""
        couples = sum(len(one.rows.pairs) * (len(one.rows.pairs) - 1) // 2 for one in self.lists)
        return 1 - 2 * sum(one.rows.inversions for one in self.lists) / couples if couples else None

    @property
    def length_error(self) -> float | None:
        """Mean difference of the lengths, whichever is longer."""
        differences = [abs(one.rows.truth_rows - one.rows.result_rows) for one in self.lists]
        return sum(differences) / len(differences) if differences else None

    @property
    def duplicates(self) -> int:
        """Rows that repeat another of their list."""
        return sum(one.rows.duplicates for one in self.lists)

    @property
    def cut(self) -> int:
        """Lists that end too early."""
        return sum(one.rows.is_cut for one in self.lists)


@dataclass(frozen=True)
class DocumentScore:
    """One document of the truth."""

    uri: str
    state: Literal["found", "failed", "missing"]
    code: str | None
    duplicates: int
    pages: Pages
    comparison: Comparison
    is_valid: bool | None
    is_constrained: bool | None
    evidence: Counter[str]

    @cached_property
    def fields(self) -> dict[str, FieldScore]:
        """Outcomes by field, in the order in which fields come up."""
        found: dict[str, FieldScore] = {}
        for leaf in self.comparison.leaves:
            found.setdefault(leaf.place.field, FieldScore()).outcomes[leaf.outcome] += 1
        return found

    @cached_property
    def all_fields(self) -> FieldScore:
        """Outcomes of all leaves."""
        return FieldScore(Counter(leaf.outcome for leaf in self.comparison.leaves))

    @property
    def all_lists(self) -> ListScore:
        """Rows of all lists."""
        return ListScore(self.comparison.lists)

    def is_right(self, outcomes: frozenset[Outcome] = RIGHT) -> bool:
        """Whether the record is there and each leaf has one of ``outcomes``."""
        return self.state == "found" and self.comparison.is_right(outcomes)


class Evaluation:
    """A run beside the truth, document by document; ``unexpected`` are documents that the truth does not have."""

    def __init__(self, documents: Sequence[DocumentScore], unexpected: Sequence[str]) -> None:
        self.documents = documents
        self.unexpected = unexpected

    @cached_property
    def fields(self) -> dict[str, FieldScore]:
        """Outcomes by field, in the order in which fields come up."""
        found: dict[str, FieldScore] = {}
        for document in self.documents:
            for pointer, score in document.fields.items():
                found.setdefault(pointer, FieldScore()).outcomes.update(score.outcomes)
        return found

    @cached_property
    def lists(self) -> dict[str, ListScore]:
        """Rows by the field of their list."""
        found: dict[str, ListScore] = {}
        for document in self.documents:
            for one in document.comparison.lists:
                found.setdefault(one.field, ListScore()).lists.append(one)
        return found

    @cached_property
    def metrics(self) -> dict[str, Ratio]:
        """What ``--fail-under`` takes, by name."""
        found = [one for one in self.documents if one.state == "found"]
        validated = [one.is_valid for one in found if one.is_valid is not None]
        count = len(self.documents)
        metrics = {
            "coverage": wilson(len(found), count),
            "page_coverage": self._over(lambda one: (one.pages.answered, one.pages.expected)),
            "schema_valid": wilson(sum(validated), len(validated)),
            "constrained": wilson(sum(bool(one.is_constrained) for one in found), len(found)),
            "document_exact": wilson(sum(one.is_right(EXACT) for one in self.documents), count),
            "document_normalised": wilson(sum(one.is_right() for one in self.documents), count),
        }
        for which in ("precision", "recall", "f1"):
            metrics[f"field_{which}"] = bootstrap([one.all_fields.parts(which) for one in self.documents])
        metrics["field_exact_f1"] = self._over(lambda one: one.all_fields.parts("f1", EXACT))
        for which in ("precision", "recall", "f1"):
            metrics[f"row_{which}"] = bootstrap([one.all_lists.parts(which) for one in self.documents])
        metrics["row_equal_f1"] = self._over(lambda one: one.all_lists.parts("f1", only_equal=True))
        metrics["evidence"] = self._over(
            lambda one: (one.evidence.total() - one.evidence["none"], one.evidence.total())
        )
        return metrics

    def metric(self, name: str) -> Ratio:
        """One of ``metrics``, or of one field: ``field_f1:/total``.

        Raises:
            InvalidInput: there is no such metric, or no such field.
        """
        if name in self.metrics:
            return self.metrics[name]
        kind, _, pointer = name.partition(":")
        if kind != "field_f1" or not pointer:
            raise InvalidInput(f"{name} is no metric: take one of {', '.join(self.metrics)}, or field_f1:/FIELD")
        if pointer not in self.fields:
            raise InvalidInput(f"{name}: no truth and no record has the field; there are {', '.join(self.fields)}")
        return self.field_f1(pointer)

    def field_f1(self, pointer: str) -> Ratio:
        """F1 of one field, over all documents."""
        return self._over(lambda one: one.fields.get(pointer, FieldScore()).parts("f1"))

    def _over(self, parts: Callable[[DocumentScore], Parts]) -> Ratio:
        return bootstrap([parts(one) for one in self.documents])


def evaluate(truths: Sequence[Truth], results: Results) -> Evaluation:
    """Compare the records of a run with their truths."""
    found, unexpected = match_documents(truths, results)
    return Evaluation([_score(truth, found[truth.uri]) for truth in truths], unexpected)


def compare_runs(baseline: Evaluation, now: Evaluation) -> dict[str, McNemar]:
    """McNemar's test of two runs over one truth: of ``documents``, of all ``leaves`` of the truth, and of each field.

    Right is what is right after normalisation. Leaves of one document are right or wrong together, which the test
    does not know: where documents and leaves disagree, trust the documents.
    """
    before, after = _right_leaves(baseline), _right_leaves(now)
    tests = {
        "documents": _mcnemar({one.uri: one.is_right() for one in baseline.documents},
                              {one.uri: one.is_right() for one in now.documents}),
        "leaves": _mcnemar(before, after),
    }  # fmt: skip
    for pointer in dict.fromkeys(key[1] for key in before):
        tests[pointer] = _mcnemar(_of_field(before, pointer), _of_field(after, pointer))
    return tests


_LeafKey = tuple[str, str, str]  # document, field, pointer into the truth


def _right_leaves(evaluation: Evaluation) -> dict[_LeafKey, bool]:
    return {
        (document.uri, leaf.place.field, leaf.place.truth): leaf.outcome in RIGHT
        for document in evaluation.documents
        for leaf in document.comparison.leaves
        if leaf.outcome not in ("invented", "absent")
    }


def _of_field(right: Mapping[_LeafKey, bool], pointer: str) -> dict[_LeafKey, bool]:
    return {key: value for key, value in right.items() if key[1] == pointer}


def _mcnemar(before: Mapping[K, bool], after: Mapping[K, bool]) -> McNemar:
    both = [(before[key], after[key]) for key in before if key in after]
    return McNemar(len(both), both.count((True, False)), both.count((False, True)))


def _score(truth: Truth, found: Found) -> DocumentScore:
    record = found.record
    state: Literal["found", "failed", "missing"] = "found"
    code = None
    if record is None:
        state, code = ("failed", found.failures[-1].code) if found.failures else ("missing", None)
    elif record.status == "failed":
        state, code = "failed", next((page.error.code for page in record.pages if page.error), "failed")
    return DocumentScore(
        uri=truth.uri,
        state=state,
        code=code,
        duplicates=max(0, len(found.records) - 1),
        pages=_pages(truth, record),
        comparison=compare(truth.value, record.value if record else None),
        is_valid=record.validation.ok if record and record.validation else None,
        is_constrained=record.constrained if record else None,
        evidence=_evidence(record),
    )


def _pages(truth: Truth, record: DocumentRecord | None) -> Pages:
    numbers = truth.page_numbers
    if record is None:
        return Pages(len(numbers), others=Counter(missing=len(numbers))) if numbers else Pages(is_known=False)
    by_number: dict[int, PageUse] = {page.number: page for page in record.pages}
    pages = Pages(duplicate=len(record.pages) - len(by_number))
    for number in numbers or by_number:
        page = by_number.get(number)
        pages.expected += 1
        if page is None:
            pages.others["missing"] += 1
        elif page.status in ("ok", "blank"):
            pages.answered += 1
        else:
            pages.others[page.error.code if page.error else page.status] += 1
    return pages


def _evidence(record: DocumentRecord | None) -> Counter[str]:
    """Leaves by their evidence, of those that are searched for."""
    if record is None:
        return Counter()
    return Counter(
        record.fields[pointer].evidence
        for pointer, value in leaves(record.value)
        if pointer in record.fields and has_evidence(value)
    )


def _parts(which: str, right: int, expected: int, given: int) -> Parts:
    if which == "f1":
        return 2 * right, expected + given
    return right, expected if which == "recall" else given
