"""Blocks of HTML: a ``div`` with ``data-label`` and ``data-bbox`` for each (Chandra OCR 2, Surya 2), as Markdown.

Tables stay HTML. No text is left out, those of headers and footers included; boxes are. Tags of other names are text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nanovllm.pipeline.documents.answers.html_tags import APART, INLINE, TABLE_PARTS, HtmlTag, html_tags
from nanovllm.pipeline.documents.answers.markdown_blocks import MarkdownBlocks, fenced
from nanovllm.pipeline.documents.answers.markup import as_formula, as_markdown, unescaped

_SPACES = re.compile(r"\s+")
_HEADING = re.compile(r"h[1-6]")
_NUMBER = re.compile(r"\d{1,9}")
_MARKS = {"b": "**", "strong": "**", "i": "*", "em": "*", "del": "~~", "code": "`"}
_ROWS = {"table", "tr", "td", "th", "thead", "tbody", "tfoot"}


def read_html_blocks(text: str) -> str | None:
    """The blocks as Markdown; None where there is no ``div`` with a label.

    A table, a formula or code that is not closed ends with its block; rows outside of a table are one.
    """
    tags = html_tags(text)
    if not any(_is_block(tag) for tag in tags):
        return None
    page = _Page()
    place = position = 0
    while place < len(tags):
        tag = tags[place]
        page.text(text[position : tag.start])
        if tag.closes or tag.name not in ("math", "pre", *_ROWS):
            page.tag(tag)
            position, place = tag.end, place + 1
        elif tag.name in _ROWS:
            position, place, missing = _table_end(tags, place, len(text))
            opening = "" if tag.name == "table" else "<table>"
            page.block(f"{opening}{text[tag.start : position].rstrip()}{'</table>' * missing}")
        else:
            last = _element_end(tags, place)
            end = tags[last].start if last < len(tags) else len(text)
            if tag.name == "math":
                page.formula(text[tag.end : end], is_display=tag.attributes().get("display", "").lower() == "block")
            else:
                page.block(fenced(_code(text, tags[place:last], end)))
            is_closed = last < len(tags) and tags[last].name == tag.name
            position, place = (tags[last].end, last + 1) if is_closed else (end, last)
    page.text(text[position:])
    return page.markdown()


def _is_block(tag: HtmlTag) -> bool:
    return tag.name == "div" and not tag.closes and "data-label" in tag.attributes()


def _element_end(tags: Sequence[HtmlTag], place: int) -> int:
    """Where the tag is that ends the element of the tag at ``place``: its own, or one of its block."""
    name = tags[place].name
    for end in range(place + 1, len(tags)):
        tag = tags[end]
        if (tag.closes and tag.name in (name, "div")) or _is_block(tag):
            return end
    return len(tags)


def _table_end(tags: Sequence[HtmlTag], place: int, length: int) -> tuple[int, int, int]:
    """Position and tag behind the table that begins with the tag at ``place``, and how many tables it leaves open."""
    tables, divs = 1, 0
    last = place
    for end in range(place + 1, len(tags)):
        tag = tags[end]
        divs += 0 if tag.name != "div" else -1 if tag.closes else 1
        if divs < 0 or _is_block(tag):
            length = tag.start
            break
        if tag.name == "table":
            tables += -1 if tag.closes else 1
            if tables == 0:
                return tag.end, end + 1, 0
        if tag.name in TABLE_PARTS:
            last = end
    else:
        end = len(tags)
    return (tags[last].end, last + 1, tables) if tags[last].closes else (length, end, tables)


def _code(text: str, tags: Sequence[HtmlTag], end: int) -> str:
    """The text between ``tags`` and up to ``end``, without tags that stand within a line."""
    ends = [*(tag.start for tag in tags[1:]), end]
    parts: list[str] = []
    for tag, stop in zip(tags, ends, strict=True):
        is_kept = tag.name not in INLINE or tag.name in ("img", "input")
        parts.append("\n" if tag.name == "br" else text[tag.start : tag.end] if is_kept and parts else "")
        parts.append(text[tag.end : stop])
    return unescaped("".join(parts)).strip("\r\n")


class _Page:
    """A page's Markdown as it is written, tag by tag."""

    def __init__(self) -> None:
        self._blocks = MarkdownBlocks()
        self._parts: list[str] = []

    def markdown(self) -> str:
        self._paragraph()
        return self._blocks.markdown()

    def text(self, text: str) -> None:
        plain = _SPACES.sub(" ", unescaped(text))
        if not self._parts or self._parts[-1][-1].isspace():
            plain = plain.lstrip()
        self._append(as_markdown(plain))

    def block(self, block: str) -> None:
        self._paragraph()
        self._blocks.add(block)

    def formula(self, latex: str, *, is_display: bool) -> None:
        edge = "$$" if is_display else "$"
        plain = _SPACES.sub(" ", unescaped(latex)).strip()
        self._append(f"{edge}{as_formula(plain)}{edge}" if plain else "")

    def tag(self, tag: HtmlTag) -> None:
        name = tag.name
        if name in APART:
            self.text(" ")
        elif name not in INLINE:
            self._paragraph()
        if name in ("ul", "ol", "li"):
            self._list(tag)
        elif name == "br":
            self._append("  \n")
        elif name in ("img", "input", "option"):
            self._field(name, tag)
        elif _HEADING.fullmatch(name) and not tag.closes:
            self._append(f"{'#' * int(name[1])} ")
        elif name in _MARKS:
            self._append(_MARKS[name])
        elif name in ("sup", "sub", "u"):
            self._append(f"<{'/' if tag.closes else ''}{name}>")

    def _paragraph(self) -> None:
        self._blocks.add("".join(self._parts))
        self._parts = []

    def _append(self, part: str) -> None:
        if part:
            self._parts.append(part)

    def _list(self, tag: HtmlTag) -> None:
        if tag.name == "li" and tag.closes:
            self._blocks.close_item()
        elif tag.name == "li":
            self._blocks.open_item()
        elif tag.closes:
            self._blocks.close_list()
        else:
            start = tag.attributes().get("start", "")
            self._blocks.open_list(None if tag.name == "ul" else int(start) if _NUMBER.fullmatch(start) else 1)

    def _field(self, name: str, tag: HtmlTag) -> None:
        attributes = tag.attributes()
        if tag.closes:
            pass
        elif name == "img":
            self._append(f"![{as_markdown(unescaped(attributes.get('alt', '')))}]()")
        elif name == "option" or "checked" in attributes or attributes.get("type", "").lower() in ("checkbox", "radio"):
            self._append("[x] " if attributes.keys() & {"checked", "selected"} else "[ ] ")
        else:
            self.text(attributes.get("value") or attributes.get("placeholder", ""))
