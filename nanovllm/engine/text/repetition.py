"""Runaway repetition: the commonest way for a model that reads documents to fail, and the costliest, because it ends
only where ``max_tokens`` does.
"""

from __future__ import annotations

from collections.abc import Sequence

REPEATS = 4
"""How many times a passage must fill the window for it to be a loop."""


def is_loop(token_ids: Sequence[int]) -> bool:
    """Whether all of ``token_ids`` is one passage, repeated at least ``REPEATS`` times; the last may be cut short."""
    length = len(token_ids)
    period = length - _longest_border(token_ids)
    return period * REPEATS <= length


def _longest_border(token_ids: Sequence[int]) -> int:
    """The length of the longest proper beginning that is also the end (the prefix function of Knuth, Morris, Pratt)."""
    borders = [0] * len(token_ids)
    border = 0
    for place in range(1, len(token_ids)):
        while border and token_ids[place] != token_ids[border]:
            border = borders[border - 1]
        border += token_ids[place] == token_ids[border]
        borders[place] = border
    return border
