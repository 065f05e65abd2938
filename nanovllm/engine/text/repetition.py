"""Detection of runaway repetition: a common failure of document models, which otherwise ends only at ``max_tokens``."""

from __future__ import annotations

from collections.abc import Sequence

MIN_REPEATS = 4
"""How many times a passage must fit into the window to count as a loop."""


def is_loop(token_ids: Sequence[int]) -> bool:
    """Whether ``token_ids`` are one passage, at least ``MIN_REPEATS`` times; the last may be cut short."""
    length = len(token_ids)
    period = length - _longest_border(token_ids)
    return period * MIN_REPEATS <= length


def _longest_border(token_ids: Sequence[int]) -> int:
    """The length of the longest proper beginning that is also the end (the prefix function of Knuth, Morris, Pratt)."""
    borders = [0] * len(token_ids)
    border = 0
    for index in range(1, len(token_ids)):
        while border and token_ids[index] != token_ids[border]:
            border = borders[border - 1]
        border += token_ids[index] == token_ids[border]
        borders[index] = border
    return border
