"""Tables on terminals of several widths: nothing that a reader needs is cut."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from rich.console import Console
from sample_messages import dead_letter, document_record, result

from nanovllm.cli.dlq import COLUMNS, SHORT_COLUMNS, _row, _short_row
from nanovllm.cli.tables import ResultRows, few
from nanovllm.client.dead_letters import DeadLetterRecord
from nanovllm.messages.result import InputUse
from nanovllm.terminal import print_table

Capture = pytest.CaptureFixture[str]
JOB_ID = "0f6a1c52-8f0e-4a55-9c1c-2f2b8d1f7a10"
ANSWER = '{"vendor": "VELVET SOFA", "number": "873849", "date": "07 JUL 2024", "total": "1,204.50"}'


@pytest.fixture
def letters() -> list[DeadLetterRecord]:
    failed_at = datetime(2030, 1, 31, 12, 0, 5, tzinfo=UTC)
    fields = {"code": "unsupported_image_format", "message": "the PNG image is truncated or corrupt"}
    one = dead_letter(job_id=JOB_ID, failed_at=failed_at, **fields)
    value = b'{"images": [{"data": "QQ==", "name": "scans/a.png"}]}'
    other = dead_letter(job_id=None, failed_at=failed_at, code="invalid_job", message="x" * 150)
    return [DeadLetterRecord(3, 1041, one, None, value, ()), DeadLetterRecord(3, 1042, other, None, b"", ())]


def words(text: str) -> str:
    return " ".join(text.split())


def test_results_at_80_columns_have_the_whole_width_for_their_text(capsys: Capture) -> None:
    rows = ResultRows(as_json=False, console=terminal(80))
    rows.show(result(job_id=JOB_ID, text=ANSWER))
    fields = {"code": "unsupported_image_format", "message": "the image is an SVG", "inputs": ("scans/a.svg", "b.svg")}
    rows.show(dead_letter(job_id=JOB_ID, **fields))
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert all(len(line) <= 80 for line in shown)
    assert words(" ".join(shown[:2])) == f"{JOB_ID} ok 60+3 tokens 20 ms cache hit s3://bucket/k"
    assert words("".join(shown[2:4])) == words(ANSWER)
    assert shown[-2:] == [f"{JOB_ID}  invalid  scans/a.svg, b.svg", "  unsupported_image_format: the image is an SVG"]


def test_results_off_a_terminal_are_plain_lines_whatever_their_length(capsys: Capture) -> None:
    ResultRows(as_json=False).show(result(text="word " * 60 + "end"))
    head, text = capsys.readouterr().out.splitlines()
    assert head == "r-1  ok  60+3 tokens  20 ms  cache hit  s3://bucket/k"
    assert text == "  " + "word " * 60 + "end"


def test_records_of_documents_are_rows_among_them(capsys: Capture) -> None:
    ResultRows(as_json=False).show(document_record())
    head, text = capsys.readouterr().out.splitlines()
    assert document_record().document.uri in head
    assert json.loads(text) == document_record().value


def test_results_at_a_wide_terminal_are_columns_under_one_head(capsys: Capture) -> None:
    rows = ResultRows(as_json=False, console=terminal(140))
    rows.show(result())
    rows.show(result(job_id="r-2"))
    head, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["job", "inputs", "status", "text", "tokens", "cache", "ms"]
    assert lines == [[job, "s3://bucket/k", "ok", "12.50", "60+3", "hit", "20"] for job in ("r-1", "r-2")]


def test_a_row_names_a_few_of_many_images_and_json_names_all(capsys: Capture) -> None:
    uses = tuple(
        InputUse(name=f"{number}.png", sha256="0a" * 32, width=1, height=1, cache="hit") for number in range(5)
    )
    assert few(result(inputs=uses).input_names) == "0.png, 1.png, 2.png, and 2 more"
    assert few(result(inputs=()).input_names) == few(dead_letter().inputs) == ""
    rows = ResultRows(as_json=True)
    rows.show(result(inputs=uses))
    rows.show(dead_letter(inputs=("a.png", "s3://bucket/b.png")))
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert [use["name"] for use in first["inputs"]] == [f"{number}.png" for number in range(5)]
    assert second["inputs"] == ["a.png", "s3://bucket/b.png"]


def terminal(columns: int) -> Console:
    """A terminal without colours, whose output is captured."""
    return Console(force_terminal=True, color_system=None, width=columns)


def test_dead_letters_at_80_columns_are_which_code_when_and_why(
    letters: list[DeadLetterRecord], capsys: Capture
) -> None:
    print_table(SHORT_COLUMNS, map(_short_row, letters), as_json=False, console=terminal(80))
    shown = capsys.readouterr().out
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines())
    assert {JOB_ID, "3:1042", "unsupported_image_format", "invalid_job"} <= set(shown.split())
    assert "2030-01-31 12:00:05Z" in shown
    assert "the PNG image is truncated or corrupt" in words(shown)
    assert shown.count("x") >= 150, "a long word is folded, not cut"


def test_off_a_terminal_each_row_is_one_plain_line(letters: list[DeadLetterRecord], capsys: Capture) -> None:
    print_table(SHORT_COLUMNS, map(_short_row, letters), as_json=False)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == list(SHORT_COLUMNS)
    assert [row.split()[0] for row in rows] == [JOB_ID, "3:1042"]
    assert rows[1].endswith("x" * 150)
    assert not set("┃│━─…") & set("".join(rows))


def test_json_has_booleans_of_its_own(letters: list[DeadLetterRecord], capsys: Capture) -> None:
    print_table(COLUMNS, map(_row, letters), as_json=True)
    row = json.loads(capsys.readouterr().out)[0]
    assert row["retryable"] is letters[0].letter.retryable
    assert (row["attempts"], row["replays"], row["inputs"]) == (letters[0].letter.attempts, 0, ["scans/a.png"])
    print_table(("job", "retryable"), [("a", True), ("b", False)], as_json=False)
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [["a", "yes"], ["b", "no"]]


def test_rows_that_do_not_fit_become_blocks(letters: list[DeadLetterRecord], capsys: Capture) -> None:
    print_table(COLUMNS, map(_row, letters), as_json=False, console=terminal(80))
    shown = capsys.readouterr().out
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines())
    one, other = ([line.split(None, 1) for line in block.splitlines()] for block in shown.split("\n\n"))
    assert [name for name, _ in one] == list(COLUMNS)
    found = {name: value.strip() for name, value in one}
    assert (found["place"], found["code"], found["job_id"]) == ("3:1041", "unsupported_image_format", JOB_ID)
    assert found["inputs"] == "scans/a.png"
    assert found["message"] == "the PNG image is truncated or corrupt"
    assert "job_id" not in [line[0] for line in other], "an empty cell takes no line"
    assert shown.count("x") >= 150, "a long word is folded, not cut"


@pytest.mark.parametrize("columns", [200, 220])
def test_dead_letters_at_a_wide_terminal_are_one_table_that_folds_no_name(
    columns: int, letters: list[DeadLetterRecord], capsys: Capture
) -> None:
    print_table(COLUMNS, map(_row, letters), as_json=False, console=terminal(columns))
    shown = capsys.readouterr().out
    assert all(len(line.rstrip()) <= columns for line in shown.splitlines())
    assert shown.splitlines()[1].replace("┃", " ").split() == list(COLUMNS)
    assert {"3:1041", "unsupported_image_format", JOB_ID, "3:1042", "invalid_job"} <= set(shown.split())
    assert "…" not in shown
    assert shown.count("x") >= 150


def test_a_table_that_fits_80_columns_stays_a_table(capsys: Capture) -> None:
    print_table(("topic", "state"), [("nanovllm.jobs", "created")], as_json=False, console=terminal(80))
    assert capsys.readouterr().out.splitlines()[1].split("┃")[1].strip() == "topic"
