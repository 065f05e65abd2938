"""Tables in OTSL: a token for each cell, ``<nl>`` behind each row (Lysak et al., 2023), as HTML tables."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nanovllm.pipeline.documents.answers.markup import as_html, without_tags

_TOKEN = re.compile(r"<(fcel|ecel|lcel|ucel|xcel|ched|rhed|srow|nl)>")
_HEADS = {"ched", "rhed", "srow"}
MAX_PADDING = 4
"""A table whose rows, made as wide as the widest, have so many times the cells that it writes is none."""


@dataclass
class _Cell:
    token: str
    text: str
    across: int = 1
    down: int = 1


def read_otsl(text: str) -> str | None:
    """The table as HTML between the texts around it; None without a table, or where its rows differ much in width.

    ``<lcel>`` belongs to the cell on its left, ``<ucel>`` to the one above, ``<xcel>`` to both; one with a text, or
    without such a cell, is a cell of its own. Short rows end with empty cells. Text between rows is a cell.
    """
    tokens = list(_TOKEN.finditer(text))
    if not tokens:
        return None
    rows: list[list[_Cell]] = [[]]
    behind = ""
    ends = [token.start() for token in tokens[1:]] + [len(text)]
    for token, end in zip(tokens, ends, strict=True):
        content = text[token.end() : end].strip()
        if token[1] != "nl":
            rows[-1].append(_Cell(token[1], content))
        elif end == len(text):
            behind = content
        else:
            rows.append([_Cell("fcel", content)] if content else [])
    rows = [row for row in rows if row]
    width = max(map(len, rows), default=0)
    if not rows or width * len(rows) > MAX_PADDING * sum(map(len, rows)):
        return None
    for row in rows:
        row += [_Cell("ecel", "") for _ in range(width - len(row))]
    table = f"<table>{''.join(f'<tr>{row}</tr>' for row in _html_rows(rows))}</table>"
    before = text[: tokens[0].start()].strip()
    return "\n\n".join(part for part in (without_tags(before), table, without_tags(behind)) if part)


def _html_rows(rows: list[list[_Cell]]) -> list[str]:
    owners = _owners(rows)
    is_covered = [[False] * len(row) for row in rows]
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            if owners[number][column] is not cell:
                continue
            while column + cell.across < len(row) and owners[number][column + cell.across] is cell:
                cell.across += 1
            while number + cell.down < len(rows) and all(
                owner is cell for owner in owners[number + cell.down][column : column + cell.across]
            ):
                cell.down += 1
            for covered in is_covered[number : number + cell.down]:
                covered[column : column + cell.across] = [True] * cell.across
            is_covered[number][column] = False
    return ["".join(_html_cell(cell) for cell, covered in zip(row, below, strict=True) if not covered)
            for row, below in zip(rows, is_covered, strict=True)]  # fmt: skip


def _owners(rows: list[list[_Cell]]) -> list[list[_Cell]]:
    """For each place of the table, the cell that it belongs to."""
    owners: list[list[_Cell]] = []
    for number, row in enumerate(rows):
        owners.append([])
        for column, cell in enumerate(row):
            left = owners[number][column - 1] if column else None
            above = owners[number - 1][column] if number else None
            owner = None if cell.text else {"lcel": left, "ucel": above, "xcel": above}.get(cell.token)
            owners[number].append(owner or cell)
    return owners


def _html_cell(cell: _Cell) -> str:
    name = "th" if cell.token in _HEADS else "td"
    spans = f' colspan="{cell.across}"' if cell.across > 1 else ""
    spans += f' rowspan="{cell.down}"' if cell.down > 1 else ""
    return f"<{name}{spans}>{as_html(cell.text)}</{name}>"
