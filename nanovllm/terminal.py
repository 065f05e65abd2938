"""Terminal output: text of models and producers without markup and escape sequences."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# Control characters (ESC among them), and those that reverse or hide what stands beside them.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def plain(text: str) -> Text:
    """``text`` as it is, in one line: line ends as ``↵``, unprintable characters as their escapes, no markup."""
    line = text.replace("\r\n", "\n").replace("\n", "↵")
    return Text(_UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), line))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, as_json: bool) -> None:
    """``rows`` as a table, or as one JSON array of objects named by ``columns``."""
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*(plain(cell) for cell in row))
    Console().print(table)


def print_json(value: Any) -> None:
    """``value`` as one line of JSON; everything beyond ASCII is escaped, so a terminal has nothing to obey."""
    print(json.dumps(value))
