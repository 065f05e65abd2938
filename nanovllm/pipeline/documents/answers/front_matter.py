"""Markdown below a YAML front matter (olmOCR 2)."""

from __future__ import annotations

import re

_FENCE = "---"
_ENTRY = re.compile(
    r"""(?:primary_language|is_rotation_valid|rotation_correction|is_table|is_diagram):\s*["']?[\w-]{0,32}["']?"""
)
_MAX_LINES = 32


def read_front_matter(text: str) -> str | None:
    """The Markdown behind the front matter; None where there is none, it does not end, or a line is no known entry."""
    lines = text.lstrip("\ufeff \t\r\n").split("\n", _MAX_LINES)
    if lines[0].rstrip() != _FENCE:
        return None
    for number, line in enumerate(lines[1:_MAX_LINES], 1):
        entry = line.strip()
        if entry == _FENCE and number > 1:
            return "\n".join(lines[number + 1 :]).strip()
        if entry and not _ENTRY.fullmatch(entry):
            return None
    return None
