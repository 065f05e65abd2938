"""``nanovllm evaluate``: its figures are those that were counted by hand on planted errors."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from anls_star import anls_score
from sample_messages import document_record

from nanovllm.cli.main import main
from nanovllm.messages.document_record import DocumentUse, FieldMeta, PageError, PageUse, RouteUse, ValidationOutcome
from nanovllm.pipeline.documents.evaluation import intervals, row_matching
from nanovllm.pipeline.documents.evaluation.comparison import compare
from nanovllm.pipeline.documents.evaluation.intervals import McNemar, bootstrap, wilson
from nanovllm.pipeline.documents.evaluation.leaves import is_equal, is_exact
from nanovllm.pipeline.documents.evaluation.row_matching import assign, match_rows

Capture = pytest.CaptureFixture[str]
OK = PageUse(number=1, status="ok", source="model")


def record(uri: str, value: Any, **changes: Any) -> str:
    """A line of results: a complete record of one page, unless ``changes`` say otherwise."""
    document = DocumentUse(uri=uri, sha256="0b" * 32, size=1, media_type="application/pdf", pages=1)
    fields: dict[str, Any] = {"status": "complete", "value": value, "fields": {}, "pages": (OK,), "conflicts": ()}
    return document_record(**fields | {"document": document} | changes).model_dump_json()


def failure(uri: str, code: str) -> str:
    return json.dumps({"job_id": "d", "uri": uri, "code": code, "message": "no", "retryable": False})


def truth(uri: str, value: Any, **more: Any) -> str:
    return json.dumps({"uri": uri, "value": value, **more})


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(name: str, lines: Sequence[str]) -> str:
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines))
        return str(path)

    return write


def item(name: str, price: float) -> dict[str, Any]:
    return {"name": name, "price": price}


TRUTHS = [
    truth("s3://in/a.pdf", {"vendor": "Acme Ltd.", "date": "2024-12-31", "total": 7.5, "note": None}, pages=1),
    truth("s3://in/b.pdf", {"vendor": "Brown", "date": "2024-01-02", "total": 8, "note": "paid"}, pages=1),
    truth(
        "s3://in/c.pdf", {"vendor": "Cole", "items": [item("tea", 2), item("milk", 1), item("rye", 3)]}, pages=[1, 2]
    ),
    truth("s3://in/d.pdf", {"vendor": "Dunn", "total": 1}, pages=3),
    truth("s3://in/e.pdf", {"vendor": "Earl"}, pages=1),
    truth("s3://in/f.pdf", {"vendor": "Ford"}),
]
# a: one leaf in another spelling each (vendor, date), total exact, note absent in both: right after normalisation.
# b: vendor wrong, date missing, total exact, note missing; and an invented one. Twice, the first of them all wrong.
# c: rows milk and tea swapped, rye lost, tea once more; vendor exact. Page 2 failed.
# d: no record, and a failure. e: nothing at all. f: exact.
RESULTS = [
    record("s3://in/a.pdf", {"vendor": "ACME  Ltd.", "date": "December 31, 2024", "total": 7.5, "note": None}),
    record("s3://in/b.pdf", {}, validation=ValidationOutcome(schema_sha256="0d" * 32, ok=False)),
    record(
        "s3://in/b.pdf",
        {"vendor": "Braun", "date": None, "total": 8.0, "iban": "DE1"},
        validation=ValidationOutcome(schema_sha256="0d" * 32, ok=False),
        constrained=False,
    ),
    record(
        "s3://in/c.pdf",
        {"vendor": "Cole", "items": [item("milk", 1), item("tea", 2), item("tea", 2)]},
        status="partial",
        pages=(
            OK,
            PageUse(number=2, status="failed", error=PageError(code="page_too_large", message="", retryable=False)),
        ),
    ),
    record("s3://in/f.pdf", {"vendor": "Ford"}, fields={"/vendor": FieldMeta(source="model", evidence="exact")}),
    record("s3://in/unknown.pdf", {"vendor": "Zed"}),
]


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    code = main(["evaluate", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_figures_are_those_counted_by_hand(written: Any, capsys: Capture) -> None:
    written("run.failures.jsonl", [failure("s3://in/d.pdf", "document_encrypted")])
    code, out, _ = run(capsys, written("truth.jsonl", TRUTHS), written("run.jsonl", RESULTS), "--json")
    assert code == 0
    report = json.loads(out)

    assert report["documents"] == {
        "expected": 6, "found": 4, "missing": 1, "failed": {"document_encrypted": 1}, "duplicate": 1, "unexpected": 1,
    }  # fmt: skip
    # a 1, b 1, c 2, d 3, e 1, f as its record says: 1; answered: a, b, one of c, f.
    assert report["pages"] == {
        "expected": 9, "found": 4, "missing": 4, "incomplete": 0, "failed": {"page_too_large": 1}, "duplicate": 0,
        "documents_of_unknown_pages": 0,
    }  # fmt: skip

    def outcomes(pointer: str) -> tuple[int, ...]:
        found = report["fields"][pointer]
        return tuple(found[one] for one in ("exact", "normalised", "wrong", "missing", "invented", "absent"))

    assert outcomes("/vendor") == (2, 1, 1, 2, 0, 0)
    assert outcomes("/date") == (0, 1, 0, 1, 0, 0)
    assert outcomes("/total") == (2, 0, 0, 1, 0, 0)
    assert outcomes("/note") == (0, 0, 0, 1, 0, 1)
    assert outcomes("/iban") == (0, 0, 0, 0, 1, 0)
    assert outcomes("/items/*/name") == (2, 0, 0, 1, 1, 0)
    assert outcomes("/items/*/price") == (2, 0, 0, 1, 1, 0)

    counted = {name: (one["count"], one["total"]) for name, one in report["metrics"].items()}
    # Leaves: 10 right, 1 wrong, 7 missing, 3 invented: 18 expected, 14 given.
    assert counted == {
        "coverage": (4, 6), "page_coverage": (4, 9), "schema_valid": (3, 4), "constrained": (3, 4),
        "document_exact": (1, 6), "document_normalised": (2, 6),
        "field_precision": (10, 14), "field_recall": (10, 18), "field_f1": (20, 32), "field_exact_f1": (16, 32),
        "row_precision": (2, 3), "row_recall": (2, 3), "row_f1": (4, 6), "row_equal_f1": (4, 6), "evidence": (1, 1),
    }  # fmt: skip
    assert report["lists"]["/items"] == {
        "lists": 1, "truth_rows": 3, "result_rows": 3, "paired": 2, "equal": 2, "precision": 2 / 3, "recall": 2 / 3,
        "f1": 2 / 3, "order": -1.0, "length_error": 0.0, "duplicates": 1, "cut": 0,
    }  # fmt: skip


def test_markdown_escapes_what_documents_say(written: Any, capsys: Capture) -> None:
    truths = written("truth.jsonl", [truth("a|b.pdf", {"x|<b>\n": "one"})])
    code, out, _ = run(capsys, truths, written("run.jsonl", [record("a|b.pdf", {"x|<b>\n": "two"})]))
    assert code == 0
    assert "| /x\\|\\<b>↵ | 0 | 0 | 1 | 0 | 0 | 0 | 0.0% | 0.0% | 0.0% |" in out
    assert "| a\\|b.pdf | found | 1 | /x\\|\\<b>↵ wrong |" in out


def test_thresholds_decide_the_exit_code(written: Any, tmp_path: Path, capsys: Capture) -> None:
    files = written("truth.jsonl", TRUTHS), written("run.jsonl", RESULTS)
    assert run(capsys, *files, "--fail-under", "field_f1=0.625", "--fail-under", "field_f1:/total=0.8")[0] == 0
    code, _, err = run(capsys, *files, "--fail-under", "field_f1=0.626", "--fail-under", "coverage=0.1")
    assert (code, err) == (1, "nanovllm: field_f1 is 0.6250, and --fail-under asks for 0.626\n")
    no_schema = written("none.jsonl", [record("s3://in/f.pdf", {}, validation=None)])
    code, _, err = run(capsys, files[0], no_schema, "--fail-under", "schema_valid=0")
    assert code == 1
    assert "schema_valid has no value" in err
    for bad in ("field_f1", "field_f1=97", "field_f1=nan", "f1=0.5", "field_f1:/nothing=0.5", "=0.5"):
        assert run(capsys, *files, "--fail-under", bad)[0] == 2, bad
    assert run(capsys, *files, "--output", str(tmp_path / "report.html"))[0] == 2
    reports = [str(tmp_path / "report.md"), str(tmp_path / "report.json")]
    assert run(capsys, *files, "--output", reports[0], "--output", reports[1])[:2] == (0, "")
    assert Path(reports[0]).read_text().startswith("# Evaluation")
    assert json.loads(Path(reports[1]).read_text())["version"] == 1


def test_two_runs_are_compared_by_mcnemar(written: Any, capsys: Capture) -> None:
    truths = written("truth.jsonl", [truth(f"{n}.pdf", {"x": "yes", "y": "yes"}) for n in range(8)])
    before = [record(f"{n}.pdf", {"x": "yes" if n < 2 else "no", "y": "yes"}) for n in range(8)]
    after = [record(f"{n}.pdf", {"x": "yes" if n else "no", "y": "yes"}) for n in range(8)]
    old = written("old.jsonl", before)
    code, out, _ = run(capsys, truths, written("new.jsonl", after), "--baseline", old, "--json")
    assert code == 0
    # Only document 0 got worse, 2 to 7 got better: 2 × (1 + 7) / 2⁷.
    changed = {"compared": 8, "only_baseline": 1, "only_now": 6, "p_value": 0.125}
    same = {"compared": 8, "only_baseline": 0, "only_now": 0, "p_value": 1.0}
    assert json.loads(out)["differences"] == {
        "documents": changed, "leaves": changed | {"compared": 16}, "/x": changed, "/y": same,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("truths", "results", "says"),
    [
        ([], [], "has no line"),
        (["{}"], [], "truth.jsonl:1: no truth"),
        ([truth("a", 1), truth("a", 2)], [], "truth.jsonl:2: a stands in line 1 already"),
        ([truth("a", 1)], ['{"job_id": "a"}'], "run.jsonl:1: neither a document record nor a failure"),
        ([truth("a.pdf", 1)], [record("x/a.pdf", 1), record("y/a.pdf", 1)], "is the end of x/a.pdf and y/a.pdf"),
        (
            [truth("a", 1)],
            [record("a", 1), record("a", 1, route=RouteUse(name="other", digest="0"))],
            "records of the routes invoices, other: choose one by --route",
        ),
    ],
)
def test_misuse_names_its_line(
    written: Any, capsys: Capture, truths: Sequence[str], results: Sequence[str], says: str
) -> None:
    code, _, err = run(capsys, written("truth.jsonl", truths), written("run.jsonl", results))
    assert code == 2
    assert says in err


def test_a_route_is_chosen_and_a_truth_may_name_the_end_of_a_uri(written: Any, capsys: Capture) -> None:
    results = [record("s3://in/x/a.pdf", 1), record("s3://in/x/a.pdf", 2, route=RouteUse(name="other", digest="0"))]
    files = written("truth.jsonl", [truth("x/a.pdf", 2)]), written("run.jsonl", results)
    assert run(capsys, *files, "--route", "other", "--fail-under", "document_exact=1")[0] == 0
    assert run(capsys, *files, "--route", "invoices", "--fail-under", "document_exact=1")[0] == 1


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("Acme  LTD", "acme ltd", True),
        ("Caf\u00e9", "Cafe\u0301", True),
        ("1,250.00", 1250, True),
        ("$7.50", 7.5, True),
        ("USD 7.50", "$7.5", True),
        ("USD 7.50", "EUR 7.50", False),
        ("0012", "12", False),
        ("2024-12-31", "31 December 2024", True),
        ("2024-12-31", "30 December 2024", False),
        (True, 1, False),
        ("7.5", "7.6", False),
    ],
)
def test_equality_after_normalisation(one: Any, other: Any, equal: bool) -> None:
    assert is_equal(one, other) is is_equal(other, one) is equal


def test_exact_is_the_same_json_value() -> None:
    assert is_exact(1, 1.0)
    assert not is_exact(1, True)
    assert not is_exact(1, "1")
    assert not is_exact("a", "A")


def test_an_empty_string_says_as_little_as_null() -> None:
    assert [one.outcome for one in compare({"a": "", "b": "x"}, {"b": " "}).leaves] == ["absent", "missing"]


def test_values_of_another_kind_are_missing_and_invented() -> None:
    found = compare({"a": {"b": 1, "c": 2}, "d": 3}, {"a": "1", "d": [3]})
    assert [(one.place.field, one.outcome) for one in found.leaves] == [
        ("/a/b", "missing"), ("/a/c", "missing"), ("/a", "invented"), ("/d", "missing"), ("/d/*", "invented"),
    ]  # fmt: skip


def test_rows_are_paired_by_their_best_partner_not_the_next() -> None:
    truth_rows = [{"a": 1, "b": 1, "c": 1, "d": 1}, {"a": 1, "b": 1, "c": 2, "d": 2}]
    result_rows = [{"a": 1, "b": 1, "c": 2, "d": 3}, {"a": 1, "b": 1, "c": 1, "d": 2}]
    assert match_rows(truth_rows, result_rows).pairs == ((0, 1), (1, 0))
    assert match_rows(truth_rows[:1], [{"a": 1, "b": 5, "c": 5, "d": 5}]).pairs == ()


def test_lists_that_end_too_early_and_rows_that_repeat() -> None:
    assert match_rows([1, 2, 3, 4], [1, 2]).is_cut
    assert not match_rows([1, 2, 3, 4], [1, 2, 4]).is_cut
    assert match_rows([1, 1, 2], [1, 1, 2, 2]).duplicates == 1
    assert match_rows([1, 2, 3], [3, 1, 2]).inversions == 2


def test_the_assignment_is_the_best_of_all() -> None:
    numbers = random.Random(1)
    for _ in range(60):
        width = numbers.randint(1, 5)
        costs = [[numbers.randint(0, 9) for _ in range(width)] for _ in range(numbers.randint(1, width))]
        best = min(
            sum(row[at] for row, at in zip(costs, chosen, strict=True))
            for chosen in itertools.permutations(range(width), len(costs))
        )
        assert sum(costs[row][at] for row, at in assign(costs)) == best


def test_outcomes_agree_with_anls_star() -> None:
    """Of words without a common letter, ANLS* is the share of leaves that are right, unmatched rows counted once."""
    numbers = random.Random(2)
    words = [letter * 4 for letter in "abcdef"]
    table = [{"name": one, "price": other} for one, other in zip(words[::2], words[1::2], strict=True)]

    def value() -> dict[str, Any]:
        found = {key: numbers.choice(words[:2]) for key in "uvwxyz" if numbers.random() < 0.7}
        return {
            "header": found | {"always": "aaaa"},
            "tags": numbers.choices(words, k=numbers.randint(1, 5)),
            "rows": numbers.choices(table, k=numbers.randint(1, 5)),
        }

    for _ in range(200):
        one, other = value(), value()
        found = compare(one, other)
        right = sum(leaf.outcome == "exact" for leaf in found.leaves)
        total = sum(leaf.place.field.startswith("/header/") for leaf in found.leaves)
        total += sum(max(len(one[key]), len(other[key])) * width for key, width in (("tags", 1), ("rows", 2)))
        assert right / total == pytest.approx(anls_score(one, other)), (one, other)


def test_many_rows_are_paired_greedily(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_matching, "MAX_COMPARISONS", 3)
    truth_rows = [item("tea", 1), item("milk", 2)]
    assert match_rows(truth_rows, [item("milk", 3), item("tea", 4)]).pairs == ((0, 1), (1, 0))


def test_intervals() -> None:
    # 81 of 263: the example of Newcombe (1998), table I, method 3.
    ratio = wilson(81, 263)
    assert (round(ratio.low or 0, 4), round(ratio.high or 0, 4)) == (0.2553, 0.3662)
    assert wilson(0, 0).value is None
    parts = [(1, 2), (2, 2), (0, 2), (2, 2)] * 10
    again = bootstrap(parts)
    assert again == bootstrap(parts)
    assert again.low is not None
    assert again.high is not None
    assert again.low < 50 / 80 < again.high
    assert bootstrap([(0, 0)]).low is None


def test_documents_without_a_difference_have_no_bootstrap_interval() -> None:
    for parts in ([(2, 3), (0, 0)], [(2, 2)] * 9):
        ratio = bootstrap(parts)
        assert (ratio.value, ratio.low, ratio.high) == (ratio.count / ratio.total, None, None)


def test_intervals_of_grouped_documents_are_as_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = random.Random(3)
    parts = [(numbers.randint(0, 4), 4) for _ in range(900)]
    alone = bootstrap(parts)
    monkeypatch.setattr(intervals, "MAX_UNITS", 300)
    grouped = bootstrap(parts)
    assert (grouped.count, grouped.total) == (alone.count, alone.total)
    widths = [(one.high or 0) - (one.low or 0) for one in (grouped, alone)]
    assert widths[0] == pytest.approx(widths[1], rel=0.2)


def test_mcnemar_of_many_differences_is_near_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert McNemar(100, 5, 15).p_value == pytest.approx(0.04139, abs=1e-5)
    many = McNemar(5_000, 450, 540)
    exact = many.p_value
    monkeypatch.setattr(intervals, "MAX_EXACT", 0)
    assert many.p_value != exact
    assert many.p_value == pytest.approx(exact, rel=0.02)
