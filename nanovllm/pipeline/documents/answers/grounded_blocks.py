"""Blocks behind ``![label](x1,y1,x2,y2)``, boxes in thousandths of the page (LightOnOCR-3, grounding)."""

from __future__ import annotations

import re

_MARKER = re.compile(r"!\[([A-Za-z_][\w-]{0,31})(\+?)\]\( ?(\d{1,4}), ?(\d{1,4}), ?(\d{1,4}), ?(\d{1,4}) ?\)")


def read_grounded_blocks(text: str) -> str | None:
    """The blocks' texts as paragraphs; a block marked ``+`` goes on with the one before. None without a block."""
    marks = list(_MARKER.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        return None
    paragraphs: list[str] = []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(marks, ends, strict=True):
        block = text[mark.end() : end].strip()
        if not block:
            continue
        if mark[2] and paragraphs:
            paragraphs[-1] += f" {block}"
        else:
            paragraphs.append(f"![{block}]()" if mark[1] == "image" else block)
    return "\n\n".join(paragraphs)
