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
        places: of each token that is taken over, its place in this step and its place in ``sampled``.
    """

    sampled: Tensor
    places: list[tuple[int, int]]

    def write_to(self, token_ids: Tensor) -> None:
        """Put the tokens to their places of ``token_ids`` [T]."""
        targets, sources = together([*zip(*self.places, strict=True)], token_ids.device)
        token_ids.index_copy_(0, targets, self.sampled.index_select(0, sources))
