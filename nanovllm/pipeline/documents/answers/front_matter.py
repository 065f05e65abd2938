"""Markdown below a YAML front matter (olmOCR 2)."""

from __future__ import annotations

_FENCE = "---"
_MAX_LINES = 32


def read_front_matter(text: str) -> str | None:
    """The Markdown behind the front matter; None where there is none, or it does not end."""
    lines = text.lstrip().split("\n", _MAX_LINES)
    if lines[0].rstrip() != _FENCE:
        return None
    for number, line in enumerate(lines[1:_MAX_LINES], 1):
        if line.rstrip() == _FENCE:
            return "\n".join(lines[number + 1 :]).strip()
    return None
