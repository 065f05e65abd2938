"""Blocks of Markdown as a page is read: paragraphs, tables, and items of nested lists."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BACKTICKS = re.compile("`+")

MAX_INDENT = 24
"""Columns; lists nested deeper stay at it, so that a text's size stays in proportion to its answer's."""


@dataclass
class _List:
    indent: int
    number: int | None
    content: int
    """Columns before the text of the last item."""
    is_in_item: bool = False


class MarkdownBlocks:
    """Blocks in the order of the page; those of an item stand below its marker."""

    def __init__(self) -> None:
        self._blocks: list[str] = []
        self._lists: list[_List] = []
        self._marker: str | None = None

    def markdown(self) -> str:
        """The blocks with an empty line between them."""
        self._write_marker()
        return "\n\n".join(self._blocks)

    def add(self, block: str) -> None:
        """Write ``block``, behind its item's marker where it is the first of one; blank ones are left out."""
        block = block.strip()
        if not block:
            return
        first = " " * self._indent() if self._marker is None else self._marker
        self._marker = None
        lines = block.replace("\n", f"\n{' ' * len(first)}")
        self._blocks.append(f"{first}{lines}")

    def open_list(self, number: int | None) -> None:
        """Begin a list within the last item; its own first item has ``number``, None for a list without numbers."""
        self._write_marker()
        indent = min(MAX_INDENT, self._lists[-1].content) if self._lists else 0
        self._lists.append(_List(indent, number, indent))

    def close_list(self) -> None:
        """End the innermost list; without one, nothing."""
        self._write_marker()
        if self._lists:
            self._lists.pop()

    def open_item(self) -> None:
        """Begin an item of the innermost list; without one, of a list without numbers that ends with the item."""
        self._write_marker()
        around = self._lists[-1] if self._lists else _List(0, None, 0)
        marker = "- " if around.number is None else f"{around.number}. "
        if around.number is not None:
            around.number += 1
        around.content, around.is_in_item = around.indent + len(marker), True
        self._marker = " " * around.indent + marker

    def close_item(self) -> None:
        """End the item under way."""
        self._write_marker()
        if self._lists:
            self._lists[-1].is_in_item = False

    def _indent(self) -> int:
        if not self._lists:
            return 0
        return self._lists[-1].content if self._lists[-1].is_in_item else self._lists[-1].indent

    def _write_marker(self) -> None:
        """Write the marker of an item that has no text."""
        if self._marker is not None:
            self._blocks.append(self._marker.rstrip())
            self._marker = None


def fenced(code: str) -> str:
    """``code`` as a block of it, behind a fence longer than any in it."""
    fence = "`" * max(3, 1 + max(map(len, _BACKTICKS.findall(code)), default=0))
    return f"{fence}\n{code}\n{fence}"
