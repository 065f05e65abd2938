"""Report of an evaluation, as JSON and as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nanovllm.pipeline.documents.evaluation.comparison import RIGHT, Outcome
from nanovllm.pipeline.documents.evaluation.evaluate import EXACT, Evaluation
from nanovllm.pipeline.documents.evaluation.intervals import McNemar, Ratio
from nanovllm.terminal import plain

VERSION = 1
WORST_DOCUMENTS = 20
_OUTCOMES: tuple[Outcome, ...] = ("exact", "normalised", "wrong", "missing", "invented", "absent")

Tests = Mapping[str, McNemar]


def as_json(evaluation: Evaluation, tests: Tests | None = None) -> dict[str, Any]:
    """The whole evaluation as a JSON object; ``differences`` only with a baseline."""
    report: dict[str, Any] = {
        "version": VERSION,
        "documents": _documents(evaluation),
        "pages": _pages(evaluation),
        "metrics": {name: _ratio(one) for name, one in evaluation.metrics.items()},
        "evidence": dict(sum((one.evidence for one in evaluation.documents), Counter())),
        "fields": {
            pointer: {
                **{one: score.outcomes[one] for one in _OUTCOMES},
                "precision": _share(score.parts("precision")),
                "recall": _share(score.parts("recall")),
                "f1": _ratio(evaluation.field_f1(pointer)),
                "exact_f1": _share(score.parts("f1", EXACT)),
            }
            for pointer, score in evaluation.fields.items()
        },
        "lists": {
            pointer: {
                "lists": len(score.lists),
                "truth_rows": score.parts("recall")[1],
                "result_rows": score.parts("precision")[1],
                "paired": score.parts("recall")[0],
                "equal": score.parts("recall", only_equal=True)[0],
                **{which: _share(score.parts(which)) for which in ("precision", "recall", "f1")},
                "order": score.order,
                "length_error": score.length_error,
                "duplicates": score.duplicates,
                "cut": score.cut,
            }
            for pointer, score in evaluation.lists.items()
        },
        "by_document": [
            {
                "uri": one.uri,
                "state": one.state,
                "code": one.code,
                "is_exact": one.is_right(EXACT),
                "is_normalised": one.is_right(),
                "leaves": [
                    {"outcome": leaf.outcome, "truth": leaf.place.truth, "result": leaf.place.result}
                    for leaf in one.comparison.leaves
                    if leaf.outcome not in RIGHT and leaf.outcome != "absent"
                ],
            }
            for one in evaluation.documents
        ],
    }
    if tests is not None:
        report["differences"] = {
            name: {
                "compared": one.compared,
                "only_baseline": one.only_baseline,
                "only_now": one.only_now,
                "p_value": one.p_value,
            }
            for name, one in tests.items()
        }
    return report


def as_markdown(report: Mapping[str, Any]) -> str:
    """What ``as_json`` made, for people: metrics, fields, lists, differences, documents with most leaves not right."""
    documents, pages = report["documents"], report["pages"]
    lines = ["# Evaluation", ""]
    lines += _counts("documents", documents)
    lines += _counts("pages", pages)
    if pages["documents_of_unknown_pages"]:
        lines += [f"Documents whose pages nothing tells: {pages['documents_of_unknown_pages']}.", ""]
    rows = [[name, *_shown(one)] for name, one in report["metrics"].items()]
    lines += _table(["metric", "value", "95% interval", "of", "by"], rows)
    lines += ["## Fields", ""]
    fields = report["fields"].items()
    lines += _table(
        ["field", *_OUTCOMES, "precision", "recall", "F1", "95% interval"],
        [
            [
                name or "(whole value)",
                *(one[outcome] for outcome in _OUTCOMES),
                *map(_percent, (one["precision"], one["recall"])),
                *_shown(one["f1"])[:2],
            ]
            for name, one in fields
        ],
    )
    if report["lists"]:
        columns = ["truth_rows", "result_rows", "paired", "equal", "duplicates", "cut"]
        lines += ["## Lists", ""]
        lines += _table(
            ["list", *(one.replace("_", " ") for one in columns), "row F1", "order", "length error"],
            [
                [
                    name or "(whole value)",
                    *(one[column] for column in columns),
                    _percent(one["f1"]),
                    *map(_decimal, (one["order"], one["length_error"])),
                ]
                for name, one in report["lists"].items()
            ],
        )
    if "differences" in report:
        lines += ["## Beside the baseline", ""]
        rows = [
            [name or "(whole value)", one["compared"], one["only_baseline"], one["only_now"], f"{one['p_value']:.3g}"]
            for name, one in report["differences"].items()
        ]
        lines += _table(["what", "compared", "only baseline right", "only now right", "p (McNemar)"], rows)
    lines += _worst(report["by_document"])
    return "\n".join(lines)


def _documents(evaluation: Evaluation) -> dict[str, Any]:
    states = Counter(one.state for one in evaluation.documents)
    return {
        "expected": len(evaluation.documents),
        "found": states["found"],
        "missing": states["missing"],
        "failed": dict(Counter(one.code for one in evaluation.documents if one.state == "failed")),
        "duplicate": sum(one.duplicates for one in evaluation.documents),
        "unexpected": len(evaluation.unexpected),
    }


def _pages(evaluation: Evaluation) -> dict[str, Any]:
    pages = [one.pages for one in evaluation.documents]
    others = sum((one.others for one in pages), Counter())
    return {
        "expected": sum(one.expected for one in pages),
        "found": sum(one.answered for one in pages),
        "missing": others.pop("missing", 0),
        "incomplete": others.pop("incomplete", 0),
        "failed": dict(others),
        "duplicate": sum(one.duplicate for one in pages),
        "documents_of_unknown_pages": sum(not one.is_known for one in pages),
    }


def _worst(documents: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    wrong = sorted((one for one in documents if not one["is_normalised"]), key=lambda one: -len(one["leaves"]))
    if not wrong:
        return
    yield from ["## Documents that are not right", ""]
    rows = []
    for one in wrong[:WORST_DOCUMENTS]:
        state = one["state"] if one["code"] is None else f"{one['state']}: {one['code']}"
        named = [
            f"{leaf['result' if leaf['outcome'] == 'invented' else 'truth']} {leaf['outcome']}"
            for leaf in one["leaves"]
        ]
        rows.append([one["uri"], state, len(named), ", ".join(named[:5])])
    yield from _table(["document", "state", "leaves", "the first of them"], rows)
    if len(wrong) > WORST_DOCUMENTS:
        yield from [f"And {len(wrong) - WORST_DOCUMENTS} more: all of them are in the JSON report.", ""]


def _counts(what: str, counts: Mapping[str, Any]) -> list[str]:
    failed = sum(counts["failed"].values())
    codes = f" ({', '.join(f'{code} {number}' for code, number in counts['failed'].items())})" if failed else ""
    parts = [
        f"{counts['found']} of {counts['expected']} {what}",
        f"{counts['missing']} missing",
        f"{failed} failed{codes}",
    ]
    parts += [f"{counts[name]} {name}" for name in ("incomplete", "duplicate", "unexpected") if counts.get(name)]
    return [_cell("; ".join(parts)) + ".", ""]


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [*(f"| {' | '.join(_cell(str(cell)) for cell in row)} |" for row in lines), ""]


def _cell(text: str) -> str:
    """Names come from documents and models: in one line, and without a table's own characters."""
    shown = plain(text).plain
    for character in "\\|<`[*":
        shown = shown.replace(character, "\\" + character)
    return shown


def _ratio(ratio: Ratio) -> dict[str, Any]:
    return {
        "value": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "count": ratio.count,
        "total": ratio.total,
        "interval": ratio.interval,
    }


def _share(parts: tuple[int, int]) -> float | None:
    return parts[0] / parts[1] if parts[1] else None


def _shown(ratio: Mapping[str, Any]) -> list[str]:
    ends = "" if ratio["low"] is None else f"{_percent(ratio['low'])} to {_percent(ratio['high'])}"
    return [_percent(ratio["value"]), ends, f"{ratio['count']} / {ratio['total']}", ratio["interval"]]


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f}%"


def _decimal(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
