"""Tokens that go from one step to the next on the device, before the host has read them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nanovllm.engine.layers.device_copy import together


@dataclass(frozen=True)
class TokensAhead:
    """Input tokens of a step that the step before sampled.

    Attributes:
        sampled: the tokens that the step before sampled, int64 [n].
        places: of the tokens that are taken over, among those of this step.
        sources: where each of them stands in ``sampled``.
    """

    sampled: Tensor
    places: list[int]
    sources: list[int]

    def write_to(self, token_ids: Tensor) -> None:
        """Put the tokens to their places of ``token_ids`` [T]."""
        places, sources = together([self.places, self.sources], token_ids.device)
        token_ids.index_copy_(0, places, self.sampled.index_select(0, sources))
