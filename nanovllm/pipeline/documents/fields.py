"""Fields of a guided output: the log probabilities of each leaf's own tokens, and leaves that have no value."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from statistics import fmean
from typing import Any

from nanovllm.engine.sampling.json_schema import resolve
from nanovllm.messages.document_record import FieldMeta, FieldSource, Span
from nanovllm.pipeline.documents.json_spans import ParsedOutput, escaped, leaves

_ABSENT: tuple[Any, ...] = (None, [], {})


def token_spans(pieces: Sequence[str]) -> list[Span]:
    """The characters of each token, from the pieces by which an incremental detokenizer made the text of them.

    A token whose piece is empty has a part of the next character (a byte of it), and counts as the tokens that
    complete it. Tokens at the end without a piece (end of sequence, half a character) have an empty span.
    """
    ends = list(accumulate(map(len, pieces)))
    spans: list[Span] = []
    following: Span = (ends[-1], ends[-1]) if ends else (0, 0)
    for piece, end in zip(reversed(pieces), reversed(ends), strict=True):
        if piece:
            following = (end - len(piece), end)
        spans.append(following)
    return spans[::-1]


def pieces_of(text: str, text_ends: Sequence[int]) -> list[str]:
    """What each token added to ``text``, from a completion's ``text_ends``; the last has what was left at the end."""
    ends = [*text_ends[:-1], len(text)] if text_ends else []
    return [text[start:end] for start, end in pairwise([0, *ends])]


def fields_of(
    output: ParsedOutput,
    schema: Mapping[str, Any] | None = None,
    pieces: Sequence[str] = (),
    logprobs: Sequence[float | None] = (),
    *,
    source: FieldSource = "model",
) -> dict[str, FieldMeta]:
    """Metadata of every leaf of an output, by JSON pointer, and of properties that the schema names and it has not.

    A token counts for a leaf where they share a character: one of ``12.50"}`` counts for the value in it. Names,
    punctuation and white space count for no leaf.

    Args:
        pieces: what each token added to the output's text (``pieces_of``); without them there are no log
            probabilities.
        logprobs: of each token; None where none is known.

    Raises:
        ValueError: as many log probabilities as pieces are needed.
    """
    if len(logprobs) != len(pieces):
        raise ValueError(f"{len(pieces)} pieces and {len(logprobs)} log probabilities: each token needs one of both")
    spans = token_spans(pieces)
    starts, ends = [start for start, _ in spans], [end for _, end in spans]
    fields = {}
    for pointer, value in leaves(output.value):
        start, end = output.spans[pointer]
        # Spans of tokens never run backwards, so both lists are sorted.
        own = [one for one in logprobs[bisect_right(ends, start) : bisect_left(starts, end)] if one is not None]
        fields[pointer] = FieldMeta(
            source="absent" if value in _ABSENT else source,
            # A log-softmax in float32 may round to a little above 0.
            logprob_min=min(0.0, *own) if own else None,
            logprob_mean=min(0.0, fmean(own)) if own else None,
        )
    for pointer in missing_properties(output.value, schema):
        fields[pointer] = FieldMeta(source="absent")
    return fields


def missing_properties(value: Any, schema: Any, root: Any = None, pointer: str = "") -> Iterator[str]:
    """JSON pointers of properties that the schema names and the value has not; a missing object counts once.

    Branches of ``anyOf`` and ``oneOf`` are not looked into: which of them the value follows is not said.
    """
    root = schema if root is None else root
    schema = resolved(schema, root)
    if isinstance(value, dict):
        for name, part in schema.get("properties", {}).items():
            below = f"{pointer}/{escaped(name)}"
            if name in value:
                yield from missing_properties(value[name], part, root, below)
            else:
                yield below
    elif isinstance(value, list):
        prefix = schema.get("prefixItems", [])
        for index, item in enumerate(value):
            part = prefix[index] if index < len(prefix) else schema.get("items")
            yield from missing_properties(item, part, root, f"{pointer}/{index}")


def resolved(schema: Any, root: Any) -> dict[str, Any]:
    """``schema`` behind its references; empty where it is none or a reference leads nowhere or in a circle."""
    seen = set()
    while isinstance(schema, dict) and isinstance(ref := schema.get("$ref"), str):
        if ref in seen:
            return {}
        seen.add(ref)
        schema = resolve(root, ref)
    return schema if isinstance(schema, dict) else {}
