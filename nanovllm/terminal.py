"""Terminal output: text of models and producers without markup and escape sequences.

Rich is imported by what draws with it: a worker, whose start counts, draws nothing.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Cell = str | bool | int | list[str]


class Row(NamedTuple):
    """A row of a report: what, how it is, and why. ``fails``: a worker cannot do without, and it does not answer."""

    subject: str
    value: str
    note: str = ""
    fails: bool = False


LAST_COLUMN_CELLS = 20
"""The last column holds sentences: its long words may be folded, as long as it has so much room."""

LINE_S = 5.0
"""Off a terminal, long work says so often how far it is."""

# Control characters (ESC among them), and those that reverse or hide what stands beside them.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def plain(text: str) -> Text:
    """``text`` as it is, in one line: line ends as ``↵``, unprintable characters as their escapes, no markup."""
    from rich.text import Text

    line = text.replace("\r\n", "\n").replace("\n", "↵")
    return Text(_UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), line))


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, as_json: bool, console: Console | None = None
) -> None:
    """``rows`` as a table, or as one JSON array of objects named by ``columns``.

    Where the terminal is too narrow for the longest word of each column, a row becomes a block of lines, one for each
    cell that is not empty: nothing is cut. Off a terminal each row is one plain line, whatever its length. Booleans are
    ``yes`` and ``no`` and lists their items for people, and JSON's own in JSON.
    """
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    from rich.console import Console
    from rich.table import Table

    console, cells = console or Console(), [[plain(_in_words(cell)) for cell in row] for row in rows]
    if not console.is_terminal:
        _print_lines([list(columns), *([cell.plain for cell in row] for row in cells)])
        return
    if cells and _least_width(columns, cells) > console.width:
        _print_blocks(console, columns, cells)
        return
    table = Table()
    for at, name in enumerate(columns):
        # A table that is too wide takes room from its widest columns, whatever their words: not from names and ids.
        is_one_word = all(len(row[at].plain.split()) <= 1 for row in cells) and at < len(columns) - 1
        table.add_column(name, overflow="fold", no_wrap=is_one_word)
    for row in cells:
        table.add_row(*row)
    console.print(table)


def _in_words(cell: Cell) -> str:
    if isinstance(cell, bool):
        return ("no", "yes")[cell]
    return ", ".join(cell) if isinstance(cell, list) else str(cell)


def _print_lines(rows: Sequence[Sequence[str]]) -> None:
    """Each row in one line, its columns below one another and two spaces apart."""
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (text + " " * (width - cell_len(text)) for text, width in zip(row, widths, strict=True))
        print("  ".join(padded).rstrip())


def _least_width(columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> int:
    """Width in cells of the narrowest table that folds no word outside its last column."""
    from rich.cells import cell_len

    texts = ([name, *(row[at].plain for row in rows)] for at, name in enumerate(columns))
    longest = [max(cell_len(word) for text in column for word in text.split() or [""]) for column in texts]
    longest[-1] = min(longest[-1], LAST_COLUMN_CELLS)
    return sum(longest) + 3 * len(columns) + 1


def _print_blocks(console: Console, columns: Sequence[str], rows: Sequence[Sequence[Text]]) -> None:
    from rich.table import Table

    for number, row in enumerate(rows):
        block = Table.grid(padding=(0, 2, 0, 0))
        block.add_column(no_wrap=True, style="bold")
        block.add_column(overflow="fold")
        for name, cell in zip(columns, row, strict=True):
            if cell.plain:
                block.add_row(name, cell)
        if number:
            console.print()
        console.print(block)


def print_json(value: Any) -> None:
    """``value`` as one line of JSON; everything beyond ASCII is escaped, so a terminal has nothing to obey."""
    print(json.dumps(value))


@contextmanager
def long_work(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show on stderr that ``what`` goes on: a bar or a spinner on a terminal, elsewhere a line every ``LINE_S``.

    Yields a function that takes how much of ``total`` is done.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console, done, started = Console(stderr=True), [0], time.monotonic()
    if console.is_terminal:
        bar = (BarColumn(), MofNCompleteColumn()) if total else (SpinnerColumn(),)
        columns = (TextColumn("{task.description}"), *bar, TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(escape(what), total=total)
            yield lambda count: progress.update(task, completed=count)
        return
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(LINE_S):
            far = f", {done[0]} of {total}" if total else ""
            print(f"{what}: {time.monotonic() - started:.0f} s{far}", file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, name="nanovllm-progress", daemon=True)
    teller.start()
    try:
        yield lambda count: done.__setitem__(0, count)
    finally:
        ended.set()
        teller.join()


@contextmanager
def long_engine_work(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """As `long_work`; says when the engine's kernels are compiled, which takes half a minute."""
    with _shown_on_stderr("nanovllm.engine.kernels"), long_work(what, total) as show:
        yield show


@contextmanager
def _shown_on_stderr(logger: str) -> Iterator[None]:
    """Show a logger's messages of INFO and above on stderr, also beside a bar or a spinner."""

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print(record.getMessage(), file=sys.stderr)

    handler, chosen = Shown(), logging.getLogger(logger)
    level, propagates = chosen.level, chosen.propagate
    chosen.addHandler(handler)
    chosen.setLevel(logging.INFO)
    chosen.propagate = False
    try:
        yield
    finally:
        chosen.removeHandler(handler)
        chosen.setLevel(level)
        chosen.propagate = propagates
