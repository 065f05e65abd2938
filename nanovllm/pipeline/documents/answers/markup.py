"""Characters of a page that would be markup: as text of Markdown, of HTML, and of a formula."""

from __future__ import annotations

import html
import re

_ENTITY = re.compile(r"&#?\w{1,32};")
_OPENING = re.compile(r"<(?=[A-Za-z/!?]|\Z)")
"""What opens a tag, or would before a text that follows."""


def unescaped(text: str) -> str:
    """``text`` with its whole character references read; an ``&`` without a semicolon stays."""
    return _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)


def as_html(text: str) -> str:
    """``text``, which may have character references, as the text of an HTML element."""
    return html.escape(unescaped(text), quote=False)


def without_tags(text: str) -> str:
    """``text`` as Markdown that shows what looks like a tag and opens none; its character references stay."""
    return _OPENING.sub("&lt;", text)


def as_markdown(text: str) -> str:
    """``text``, which has no character references, as Markdown that shows it and opens no tag."""
    return without_tags(_ENTITY.sub(lambda entity: f"&amp;{entity[0][1:]}", text))


def as_formula(text: str) -> str:
    """LaTeX that opens no tag: a space behind ``<`` means nothing in it."""
    return _OPENING.sub("< ", text)
