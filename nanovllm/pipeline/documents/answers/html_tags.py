"""Tags of HTML in an answer: those of known names whose attributes are attributes; all else is text."""

from __future__ import annotations

import re
from dataclasses import dataclass

INLINE = frozenset({
    "a", "abbr", "b", "br", "chem", "cite", "code", "del", "em", "font", "i", "img", "input", "ins", "kbd", "mark",
    "math", "q", "s", "samp", "small", "span", "strike", "strong", "sub", "sup", "u", "var"
})  # fmt: skip
"""Names that stand within a paragraph."""
APART = frozenset({"button", "label", "textarea"})
"""Names that stand within a paragraph, a space away from what is around them."""
TABLE_PARTS = frozenset({"caption", "col", "colgroup", "table", "tbody", "td", "tfoot", "th", "thead", "tr"})
_BLOCKS = frozenset({
    "address", "article", "aside", "blockquote", "body", "center", "dd", "details", "div", "dl", "dt", "fieldset",
    "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html", "legend",
    "li", "main", "nav", "ol", "optgroup", "option", "p", "pre", "section", "select", "summary", "ul"
})  # fmt: skip
_NAMES = "|".join(sorted(INLINE | APART | TABLE_PARTS | _BLOCKS, key=len, reverse=True))
_VALUE = r"""\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s"'<>`]+?)(?=[\s>]|/>))"""
_NAME = r"[A-Za-z_][\w:.-]{0,63}"
_FLAG = "checked|disabled|hidden|multiple|nowrap|readonly|required|reversed|selected"
_ATTRIBUTE = re.compile(rf"\s+(?:({_NAME}){_VALUE}|({_FLAG})(?=[\s/>]))", re.IGNORECASE)
_TAG = re.compile(rf"<(/?)({_NAMES})((?:{_ATTRIBUTE.pattern})*)\s*/?>", re.IGNORECASE)


@dataclass(frozen=True)
class HtmlTag:
    """A tag from ``start`` to ``end`` of its text, its name in small letters."""

    name: str
    closes: bool
    start: int
    end: int
    written_attributes: str

    def attributes(self) -> dict[str, str]:
        """The values by names in small letters, their character references unread; that of ``checked`` is empty."""
        return {
            (found[1] or found[5]).lower(): found[2] or found[3] or found[4] or ""
            for found in _ATTRIBUTE.finditer(f"{self.written_attributes} ")
        }


def html_tags(text: str) -> list[HtmlTag]:
    """The tags in their order."""
    return [HtmlTag(tag[2].lower(), bool(tag[1]), tag.start(), tag.end(), tag[3]) for tag in _TAG.finditer(text)]
