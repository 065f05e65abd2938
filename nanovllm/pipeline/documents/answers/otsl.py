"""Tables in OTSL: a token for each cell, ``<nl>`` behind each row (Lysak et al., 2023), as HTML tables."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

_TOKEN = re.compile(r"<(fcel|ecel|lcel|ucel|xcel|ched|rhed|srow|nl)>")
_HEADS = {"ched", "rhed", "srow"}
_OWN = {"fcel", "ecel", *_HEADS}
MAX_PADDING = 4
"""A table whose rows, made as wide as the widest, have so many times the cells that it writes is none."""


@dataclass
class _Cell:
    token: str
    text: str
    across: int = 1
    down: int = 1


def read_otsl(text: str) -> str | None:
    """The table as HTML; None where ``text`` is none, or its rows differ too much in width.

    ``<lcel>`` belongs to the cell on its left, ``<ucel>`` to the one above, ``<xcel>`` to both; one without such a cell
    is an empty cell. Short rows end with empty cells.
    """
    tokens = list(_TOKEN.finditer(text))
    if not tokens or text[: tokens[0].start()].strip():
        return None
    rows: list[list[_Cell]] = [[]]
    ends = [token.start() for token in tokens[1:]] + [len(text)]
    for token, end in zip(tokens, ends, strict=True):
        content = text[token.end() : end].strip()
        if token[1] == "nl":
            if content:
                return None
            rows.append([])
        else:
            rows[-1].append(_Cell(token[1], content))
    rows = [row for row in rows if row]
    width = max(map(len, rows), default=0)
    if not rows or width * len(rows) > MAX_PADDING * sum(map(len, rows)):
        return None
    for row in rows:
        row += [_Cell("ecel", "") for _ in range(width - len(row))]
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in _html_rows(rows))}</table>"


def _html_rows(rows: list[list[_Cell]]) -> list[str]:
    owners: list[list[_Cell]] = []
    for number, row in enumerate(rows):
        owners.append([])
        for column, cell in enumerate(row):
            left = owners[number][column - 1] if column else None
            above = owners[number - 1][column] if number else None
            owner = {"lcel": left, "ucel": above, "xcel": above}.get(cell.token)
            owners[number].append(cell if owner is None or cell.token in _OWN else owner)
    for number, row in enumerate(rows):
        for column, cell in enumerate(row):
            if owners[number][column] is not cell:
                continue
            while column + cell.across < len(row) and owners[number][column + cell.across] is cell:
                cell.across += 1
            while number + cell.down < len(rows) and owners[number + cell.down][column] is cell:
                cell.down += 1
    return ["".join(_html_cell(cell) for cell, owner in zip(row, own, strict=True) if owner is cell)
            for row, own in zip(rows, owners, strict=True)]  # fmt: skip


def _html_cell(cell: _Cell) -> str:
    name = "th" if cell.token in _HEADS else "td"
    spans = f' colspan="{cell.across}"' if cell.across > 1 else ""
    spans += f' rowspan="{cell.down}"' if cell.down > 1 else ""
    return f"<{name}{spans}>{html.escape(cell.text, quote=False)}</{name}>"
