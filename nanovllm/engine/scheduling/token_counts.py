"""Token counts: the distinct tokens of a sequence, for penalties, brought up to date by the tokens that came since."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Self

import numpy as np


class TokenCounts:
    """The distinct tokens of a growing list, and how often each is in its output."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}  # of each distinct token in the arrays
        self._tokens, self._in_output = array("q"), array("q")
        self._end = 0

    def update(self, token_ids: Sequence[int], num_prompt_tokens: int) -> Self:
        """Count the tokens of ``token_ids``, prompt and output, that came since the last call."""
        written = max(self._end, num_prompt_tokens)
        for token in set(token_ids[self._end : written]):
            self._place(token)
        for token in token_ids[written:]:
            self._in_output[self._place(token)] += 1
        self._end = len(token_ids)
        return self

    def _place(self, token: int) -> int:
        place = self._places.setdefault(token, len(self._tokens))
        if place == len(self._tokens):
            self._tokens.append(token)
            self._in_output.append(0)
        return place

    def copy(self) -> TokenCounts:
        """Counts that grow on their own from here."""
        other = TokenCounts()
        other._places, other._end = self._places.copy(), self._end
        other._tokens, other._in_output = self._tokens[:], self._in_output[:]
        return other

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens and their counts in the output, int64 [n] each."""
        return np.array(self._tokens), np.array(self._in_output)
