"""Results as rows in columns on a wide terminal, as two lines each elsewhere, or as JSON lines, as they come."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nanovllm.client.results import Outcome
from nanovllm.errors import counted
from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.messages.result import Result
from nanovllm.terminal import plain, print_json

_WIDTHS = {"job": 24, "inputs": 20, "status": 11, "text": None, "tokens": 9, "cache": 10, "ms": 8}
NARROW_COLUMNS = 140
"""A terminal of fewer columns leaves the text less than a third of a row."""
MAX_INPUTS_SHOWN = 3


class ResultRows:
    """Prints one outcome at a time; the head of the columns stands above the first."""

    def __init__(self, *, as_json: bool, console: Console | None = None) -> None:
        self._as_json = as_json
        self._console = console or Console()
        self._has_head = False

    def show(self, outcome: Outcome) -> None:
        """Print ``outcome``."""
        if self._as_json:
            print_json(outcome.model_dump(mode="json", exclude_none=True))
            return
        if self._console.width < NARROW_COLUMNS or not self._console.is_terminal:
            self._show_narrow(outcome)
            return
        table = Table(box=None, show_header=not self._has_head, expand=True, pad_edge=False)
        for name, width in _WIDTHS.items():
            table.add_column(name, width=width, overflow="fold", ratio=None if width else 1)
        table.add_row(*_cells(outcome))
        self._console.print(table)
        self._has_head = True

    def _show_narrow(self, outcome: Outcome) -> None:
        job, inputs, status, text, tokens, cache, ms = _cells(outcome)
        head = [job, status]
        if not isinstance(outcome, DeadLetter):
            head += [Text(f"{tokens} tokens"), Text(f"{ms} ms")]
            if isinstance(outcome, Result) and outcome.inputs:
                head.append(Text(f"cache {cache}"))
        if inputs.plain != "-":
            head.append(inputs)
        if not self._console.is_terminal:
            print(Text("  ").join(head).plain, f"  {text.plain}", sep="\n", flush=True)
            return
        self._console.print(Text("  ").join(head), overflow="fold")
        self._console.print(Padding(text, (0, 0, 0, 2), expand=False), overflow="fold")


def few(names: Sequence[str]) -> str:
    """The first of ``names``, and how many more there are."""
    more = [f"and {len(names) - MAX_INPUTS_SHOWN} more"] if len(names) > MAX_INPUTS_SHOWN else []
    return ", ".join([*names[:MAX_INPUTS_SHOWN], *more])


def _cells(outcome: Outcome) -> tuple[Text, ...]:
    job = plain(outcome.job_id or "?")
    if isinstance(outcome, DocumentRecord):
        return job, *_document_cells(outcome)
    inputs = plain(few(outcome.inputs if isinstance(outcome, DeadLetter) else outcome.input_names) or "-")
    if isinstance(outcome, DeadLetter):
        status = Text(outcome.error_class, style="red")
        return job, inputs, status, plain(f"{outcome.code}: {outcome.message}"), Text("-"), Text("-"), Text("-")
    usage = outcome.usage
    return (
        job,
        inputs,
        Text(outcome.status, style="green" if outcome.status == "ok" else "yellow"),
        plain(outcome.text if outcome.stored is None else outcome.stored.uri),
        Text(f"{usage.input_tokens}+{usage.output_tokens}"),
        Text(", ".join(image.cache for image in outcome.inputs) or "-"),
        Text(f"{outcome.timings_ms.total:,.0f}"),
    )


def _document_cells(record: DocumentRecord) -> tuple[Text, ...]:
    text = record.text if record.value is None else json.dumps(record.value, ensure_ascii=False)
    reused = sum(page.reused for page in record.pages)
    return (
        plain(record.document.uri),
        Text(record.status, style="green" if record.status == "complete" else "yellow"),
        plain((text or "") if record.stored is None else record.stored.uri),
        Text(f"{record.usage.input_tokens}+{record.usage.output_tokens}"),
        Text(f"{reused} of {counted(len(record.pages), 'page')} reused" if reused else "-"),
        Text(f"{record.timings_ms.total:,.0f}"),
    )
