"""Recorded passes of a tower that takes all images at one size: batches of a few sizes, each launched by one call."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Recorder = Callable[[Callable[[], Any]], Callable[[], Any]]
"""Captures a computation on tensors of fixed addresses; returns its replay."""


def batch_sizes(largest: int) -> list[int]:
    """Images of the recorded batches, ascending: powers of two, and the largest."""
    return [1 << power for power in range(largest.bit_length()) if 1 << power < largest] + [largest]


class RecordedBatches:
    """A computation on images of one size, for any number up to a largest, in the smallest batch that holds them.

    What is left of a batch are images of earlier ones. All calls come from one thread, and what else is recorded with
    the same recorder runs in it too: the recordings share memory.
    """

    def __init__(self, compute: Callable[[Tensor], Tensor], pixels: Tensor, recorder: Recorder) -> None:
        """``compute`` takes images such as ``pixels`` [largest, H, W, 3] on the device, any number of them."""
        self._pixels = pixels
        self._sizes = batch_sizes(len(pixels))
        self._embeddings = torch.empty_like(compute(pixels))
        self._replays = [self._record(compute, size, recorder) for size in reversed(self._sizes)][::-1]
        self.num_replays = 0

    def _record(self, compute: Callable[[Tensor], Tensor], size: int, recorder: Recorder) -> Callable[[], Any]:
        pixels, embeddings = self._pixels[:size], self._embeddings[:size]
        return recorder(lambda: embeddings.copy_(compute(pixels)))

    def __call__(self, pixels: Tensor) -> Tensor:
        """``compute`` of uint8 ``pixels`` [n, H, W, 3], in memory of its own."""
        self._pixels[: len(pixels)].copy_(pixels, non_blocking=True)
        self._replays[bisect_left(self._sizes, len(pixels))]()
        self.num_replays += 1
        return self._embeddings[: len(pixels)].clone()
