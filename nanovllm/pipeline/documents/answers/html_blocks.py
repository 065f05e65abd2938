"""Blocks of HTML: a ``div`` with ``data-label`` and ``data-bbox`` for each (Chandra OCR 2, Surya 2), as Markdown.

Tables stay HTML. No text is left out, those of headers and footers included; boxes are.
"""

from __future__ import annotations

import html
import re

_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]{0,15})((?:\s[^<>]*)?)>")
_LABEL = re.compile(r"""\bdata-label\s*=\s*["']""")
_ALT = re.compile(r"""\balt\s*=\s*(?:"([^"]*)"|'([^']*)')""")
_BLOCK = re.compile(r"""\bdisplay\s*=\s*["']?block""")
_CHECKED = re.compile(r"\bchecked\b")
_HEADING = re.compile(r"h[1-6]")
_BREAKS = {"div", "p", "ul", "ol", "hr", "caption", "table", "pre", *(f"h{level}" for level in range(1, 7))}
_MARKS = {"b": "**", "strong": "**", "i": "*", "em": "*", "del": "~~", "code": "`"}
_BARE_MARKER = re.compile(r"-|\d{1,9}\.")


def read_html_blocks(text: str) -> str | None:
    """The blocks as Markdown; None where there is no ``div`` with a label."""
    tags = list(_TAG.finditer(text))
    if not any(tag[2].lower() == "div" and _LABEL.search(tag[3]) for tag in tags):
        return None
    page = _Page()
    start = tables = 0
    for tag in tags:
        name, closes = tag[2].lower(), bool(tag[1])
        if tables:
            tables += 0 if name != "table" else -1 if closes else 1
            if tables == 0:
                page.raw(f"<table{text[start : tag.end()]}")
                start = tag.end()
            continue
        page.text(text[start : tag.start()])
        start = tag.end()
        if name == "table" and not closes:
            page.paragraph()
            tables, start = 1, tag.start() + len("<table")
        else:
            page.tag(name, tag[3], closes=closes)
    if tables:
        page.raw(f"<table{text[start:]}")
    else:
        page.text(text[start:])
    return page.markdown()


class _Page:
    """A page's Markdown as it is written, tag by tag."""

    def __init__(self) -> None:
        self._paragraphs: list[str] = []
        self._parts: list[str] = []
        self._lists: list[int] = []  # the next number of each list under way; 0: not numbered
        self._math = self._is_preformatted = False

    def markdown(self) -> str:
        self.paragraph(is_last=True)
        return "\n\n".join(self._paragraphs)

    def text(self, text: str) -> None:
        plain = html.unescape(text)
        self._parts.append(plain if self._is_preformatted else re.sub(r"\s+", " ", plain))

    def raw(self, text: str) -> None:
        self.paragraph()
        self._paragraphs.append(text)

    def paragraph(self, *, is_last: bool = False) -> None:
        """End the paragraph under way; the marker of a list's item waits for its text."""
        written = "".join(self._parts).strip()
        self._parts = []
        if _BARE_MARKER.fullmatch(written) and not is_last:
            self._parts = [f"{written} "]
        elif written:
            self._paragraphs.append(written)

    def tag(self, name: str, attributes: str, *, closes: bool) -> None:
        if name in _BREAKS:
            self.paragraph()
        if name in ("ul", "ol"):
            self._list(name, closes=closes)
        elif name == "li" and not closes:
            self._item()
        elif name == "br":
            self._parts.append("  \n")
        elif name == "pre":
            self._parts.append("" if closes else "```\n")
            self._is_preformatted = not closes
            if closes and self._paragraphs:
                self._paragraphs[-1] += "\n```"
        elif name == "math":
            self._formula(attributes, closes=closes)
        elif name == "img":
            alt = _ALT.search(attributes)
            self._parts.append(f"![{html.unescape((alt[1] or alt[2] or '') if alt else '')}]()")
        elif name == "input":
            self._parts.append("[x] " if _CHECKED.search(attributes) else "[ ] ")
        elif _HEADING.fullmatch(name) and not closes:
            self._parts.append(f"{'#' * int(name[1])} ")
        elif name in _MARKS and not self._is_preformatted:
            self._parts.append(_MARKS[name])
        elif name in ("sup", "sub", "u"):
            self._parts.append(f"<{'/' if closes else ''}{name}>")

    def _list(self, name: str, *, closes: bool) -> None:
        if not closes:
            self._lists.append(int(name == "ol"))
        elif self._lists:
            self._lists.pop()

    def _item(self) -> None:
        self.paragraph()
        number = self._lists[-1] if self._lists else 0
        if number:
            self._lists[-1] += 1
        self._parts.append(f"{number}. " if number else "- ")

    def _formula(self, attributes: str, *, closes: bool) -> None:
        if not closes:
            self._math = _BLOCK.search(attributes) is not None
        self._parts.append("$$" if self._math else "$")
