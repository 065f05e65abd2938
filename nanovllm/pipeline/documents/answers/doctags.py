"""DocTags: a page's elements between tags, tables in OTSL, places in ``<loc_…>`` (Granite-Docling, docling-core)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from nanovllm.pipeline.documents.answers.markdown_blocks import MarkdownBlocks, fenced
from nanovllm.pipeline.documents.answers.markup import as_formula, without_tags
from nanovllm.pipeline.documents.answers.otsl import read_otsl

_PLACE = re.compile(r"<loc_\d{1,4}>|<(?:page_break|end_of_utterance)>|<\|end_of_text\|>")
_CLASS = re.compile(r"<(?!(?:[felux]cel|ched|rhed|srow|nl|caption)>)[a-z][a-z0-9_]{0,39}>")
_LANGUAGE = re.compile(r"<_[^<>]{1,40}_>")
_FIRST_TAG = {"chart": _CLASS, "picture": _CLASS, "code": _LANGUAGE}
"""What a picture shows, and what language code is in."""
_CAPTION = re.compile(r"<(/?)caption>")
_PAIR = re.compile(r"</?(?:key|value|link)_\d{1,4}>")
_CELL = re.compile(r"<(?:[felux]cel|ched|rhed|srow|nl)>")
_HEADING = re.compile(r"section_header_level_([1-6])")
_HEADINGS = {f"section_header_level_{level}" for level in range(1, 7)}
_TEXTS = {
    *("text", "paragraph", "caption", "footnote", "page_header", "page_footer", "reference", "title", "code"),
    *("formula", "list_item", "checkbox_selected", "checkbox_unselected", "form", "key_value_region", "smiles"),
    *_HEADINGS,
}
_TABLES = {"otsl", "chart", "table", "document_index", "picture"}
_LISTS: Mapping[str, int | None] = {"ordered_list": 1, "unordered_list": None}
_ELEMENTS = {*_TEXTS, *_TABLES}
_TAG = re.compile(f"<(/?)({'|'.join(sorted({*_ELEMENTS, *_LISTS, 'doctag', 'inline', 'group'}, reverse=True))})>")


def read_doctags(text: str) -> str | None:
    """The elements as Markdown, tables as HTML; None where ``text`` has no element, or a table that is none.

    An element that is not closed ends where the next begins. What stands outside of elements is text, and so are tags
    of other names.
    """
    tags = list(_TAG.finditer(text))
    if not any(tag[2] in _ELEMENTS or tag[2] in _LISTS for tag in tags):
        return None
    last_end_of_code = text.rfind("</code>")
    blocks = MarkdownBlocks()
    name, start = "", 0
    for tag in tags:
        closes, kind = bool(tag[1]), tag[2]
        if name == "code" and kind != "code" and tag.start() < last_end_of_code:
            continue
        if name in _TABLES and kind == "caption":
            continue
        if not _add(blocks, name, text[start : tag.start()]):
            return None
        name, start = "" if closes or kind not in _ELEMENTS else kind, tag.end()
        if kind in _LISTS and closes:
            blocks.close_list()
        elif kind in _LISTS:
            blocks.open_list(_LISTS[kind])
        elif kind == "list_item" and closes:
            blocks.close_item()
        elif kind == "list_item":
            blocks.open_item()
    return blocks.markdown() if _add(blocks, name, text[start:]) else None


def _add(blocks: MarkdownBlocks, name: str, content: str) -> bool:
    """Write an element; False where it is a table whose cells make none."""
    content = _PAIR.sub(" ", _PLACE.sub("", content)).strip()
    if name in _FIRST_TAG and (first := _FIRST_TAG[name].match(content)):
        content = content[first.end() :]
    shown = without_tags(content)
    if name == "code" and content:
        blocks.add(fenced(content))
    elif name in _TABLES or _CELL.search(content):
        caption, cells = _captions_and_cells(content)
        blocks.add(without_tags(caption))
        table = read_otsl(cells)
        blocks.add(without_tags(cells) if table is None else table)
        return table is not None or name not in _TABLES or not _CELL.search(cells)
    elif name == "title" and content:
        blocks.add(f"# {shown}")
    elif heading := _HEADING.fullmatch(name if content else ""):
        blocks.add(f"{'#' * min(6, int(heading[1]) + 1)} {shown}")
    elif name == "formula" and content:
        blocks.add(f"$${as_formula(content)}$$")
    elif name.startswith("checkbox"):
        blocks.add(f"- [{'x' if name.endswith('_selected') else ' '}] {shown}")
    else:
        blocks.add(shown)
    return True


def _captions_and_cells(content: str) -> tuple[str, str]:
    """The captions of a table, a chart or a picture, wherever they stand in it, and what is around them."""
    captions: list[str] = []
    others: list[str] = []
    start, is_caption = 0, False
    for edge in _CAPTION.finditer(content):
        closes = bool(edge[1])
        (captions if closes and is_caption else others).append(content[start : edge.start()])
        start, is_caption = edge.end(), not closes
    return "\n\n".join(captions), " ".join([*others, content[start:]])
