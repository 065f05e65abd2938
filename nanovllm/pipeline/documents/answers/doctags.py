"""DocTags: a page's elements between tags, tables in OTSL, places in ``<loc_…>`` (Granite-Docling, docling-core)."""

from __future__ import annotations

import re

from nanovllm.pipeline.documents.answers.otsl import read_otsl

_TAG = re.compile(r"<(/?)([a-z][a-z0-9_]{0,39})>")
_PLACE = re.compile(r"<loc_\d{1,4}>|<(?:page_break|end_of_utterance)>|<\|end_of_text\|>|<_[^<>]{1,40}_>")
_HEADING = re.compile(r"section_header_level_([1-6])")
_TEXTS = {
    *("text", "paragraph", "caption", "footnote", "page_header", "page_footer", "reference", "title", "code"),
    *("formula", "list_item", "checkbox_selected", "checkbox_unselected", "form", "key_value_region", "smiles"),
}
_TABLES = {"otsl", "chart", "table", "document_index"}
_AROUND = {"doctag", "ordered_list", "unordered_list", "picture", "inline", "group"}


def read_doctags(text: str) -> str | None:
    """The elements as Markdown, tables as HTML; None where ``text`` has no element.

    What stands outside of elements, and an element that is not closed, is text.
    """
    blocks: list[str] = []
    ordered = number = start = 0
    name = ""
    tags = list(_TAG.finditer(text))
    if not any(_is_element(tag[2]) for tag in tags):
        return None
    for tag in tags:
        closes, kind = bool(tag[1]), tag[2]
        if name:
            if closes and kind == name:
                number += ordered and name == "list_item"
                _append(blocks, name, text[start : tag.start()], number)
                name, start = "", tag.end()
            continue
        if kind in _AROUND or (_is_element(kind) and not closes):
            _append(blocks, "", text[start : tag.start()], 0)
            start = tag.end()
            if kind == "ordered_list":
                ordered, number = int(not closes), 0
            elif kind == "unordered_list":
                ordered = number = 0
            if _is_element(kind):
                name = kind
    _append(blocks, name, text[start:], number)
    return "\n\n".join(blocks).strip()


def _is_element(kind: str) -> bool:
    return kind in _TEXTS or kind in _TABLES or _HEADING.fullmatch(kind) is not None


def _append(blocks: list[str], name: str, content: str, number: int) -> None:
    content = _PLACE.sub("", content).strip()
    if not content:
        return
    if name in _TABLES:
        caption, behind = _caption(content)
        blocks += [caption] if caption else []
        blocks.append(read_otsl(behind) or behind)
    elif name == "title":
        blocks.append(f"# {content}")
    elif heading := _HEADING.fullmatch(name):
        blocks.append(f"{'#' * min(6, int(heading[1]) + 1)} {content}")
    elif name == "formula":
        blocks.append(f"$${content}$$")
    elif name == "code":
        blocks.append(f"```\n{content}\n```")
    elif name == "list_item":
        item = f"{number}. {content}" if number else f"- {content}"
        blocks.append(item)
    elif name.startswith("checkbox"):
        blocks.append(f"- [{'x' if name.endswith('_selected') else ' '}] {content}")
    else:
        blocks.append(_TAG.sub(" ", content).strip())


def _caption(content: str) -> tuple[str, str]:
    """The caption that stands first in a table, and what is behind."""
    before, closed, behind = content.partition("</caption>")
    opened = before.strip().removeprefix("<caption>")
    return (opened.strip(), behind.strip()) if closed and opened != before.strip() else ("", content)
