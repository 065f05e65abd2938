"""Answers of a profile's form as Markdown; what is not of the form stays as the model wrote it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nanovllm.checkpoints.profiles import Parser
from nanovllm.pipeline.documents.answers.doctags import read_doctags
from nanovllm.pipeline.documents.answers.front_matter import read_front_matter
from nanovllm.pipeline.documents.answers.grounded_blocks import read_grounded_blocks
from nanovllm.pipeline.documents.answers.html_blocks import read_html_blocks
from nanovllm.pipeline.documents.answers.otsl import read_otsl

_FENCE = re.compile(r"\s*```\w{0,16}[ \t]*\n")
_TABLE_EDGE = re.compile(r"<(/?)table\b[^<>]*>", re.IGNORECASE)

_READERS: Mapping[Parser, Callable[[str], str | None]] = {
    "as_written": lambda text: text,
    "html_blocks": read_html_blocks,
    "grounded_blocks": read_grounded_blocks,
    "doctags": read_doctags,
    "otsl": read_otsl,
    "front_matter": read_front_matter,
}


@dataclass(frozen=True)
class ReadAnswer:
    """An answer as Markdown; where it ``is_unparsed``, ``text`` is as the model wrote it."""

    text: str
    is_unparsed: bool = False


def read_answer(parser: Parser, text: str, *, tables_alone: bool = False) -> ReadAnswer:
    """Read ``text`` by ``parser``; it takes time and memory in proportion to its length, and raises nothing.

    ``tables_alone`` leaves of an answer with HTML tables these alone; one without any is unparsed.
    """
    read = _READERS[parser](text if parser == "as_written" else _unfenced(text))
    if read is None:
        return ReadAnswer(text, is_unparsed=bool(text.strip()))
    if not tables_alone:
        return ReadAnswer(read)
    tables = _tables(read)
    return ReadAnswer("\n\n".join(tables)) if tables else ReadAnswer(text, is_unparsed=bool(text.strip()))


def _unfenced(text: str) -> str:
    """``text`` without the fence of a block of code around all of it; that of a cut answer has no end."""
    opening = _FENCE.match(text)
    if opening is None:
        return text
    inner = text[opening.end() :].rstrip()
    if inner.endswith("\n```"):
        return inner.removesuffix("```")
    return text if "```" in inner else inner


def _tables(text: str) -> list[str]:
    """The outermost ``<table>`` elements of ``text``; one that is not closed ends with it."""
    found: list[str] = []
    depth = start = 0
    for edge in _TABLE_EDGE.finditer(text):
        if not edge[1]:
            start = edge.start() if depth == 0 else start
            depth += 1
        elif depth:
            depth -= 1
            if depth == 0:
                found.append(text[start : edge.end()])
    return [*found, text[start:]] if depth else found
