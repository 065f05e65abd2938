"""Sampling: from logits to the next token of every row, without waiting for the device.

A greedy row is the argmax of its own logits, whatever the parameters of other rows. The random numbers of a row with a
seed follow from the seed and the position in the output: they depend neither on the rest of the batch nor on how many
positions a step samples.
"""

from __future__ import annotations

from collections import abc

import torch
from torch import Tensor

from nanovllm.engine.layers.token_ops import argmax
from nanovllm.engine.sampling.kernel_selection import SamplingKernels
from nanovllm.engine.sampling.sampling_batch import ForbiddenTokens, SamplingBatch
from nanovllm.engine.sampling.structured_output import GuidedRows
from nanovllm.engine.scheduling.sequence import Sequence

_MINUS_INFINITY = float("-inf")


class Sampler:
    """Greedy and random sampling with vLLM's parameters, in vLLM's order."""

    def __init__(
        self,
        device: torch.device,
        seed: int | None = None,
        kernels: SamplingKernels | None = None,
    ) -> None:
        """``seed`` is for the requests that bring none; None draws one from the system.

        ``kernels`` are those of `choose_kernels`; None: a CPU's, or torch's operators.
        """
        self._device = device
        self.kernels = kernels or SamplingKernels()
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def sample(self, logits: Tensor, sequences: abc.Sequence[Sequence], guided: GuidedRows | None = None) -> Tensor:
        """The next token of each sequence, from its row of ``logits`` [rows, vocab], which may be overwritten: [rows].

        ``guided``: the rows under a constraint, from `structured_output.TokenMasks`. A constraint has precedence: where
        bad words or ``min_tokens`` leave no token that it allows, they do not apply.
        """
        batch = SamplingBatch.prepare(sequences, logits.shape[1], self._device, self._generator)
        if guided is not None:
            self.kernels.forbid_masked(logits, guided.to(logits.device))
        adjust(logits, batch)
        if batch.random is None:
            return argmax(logits)
        drawn = self.kernels.draw_tokens(logits, batch.random)
        if len(drawn) == len(sequences):
            return drawn
        return argmax(logits).index_copy_(0, batch.random.rows, drawn)


def adjust(logits: Tensor, batch: SamplingBatch) -> None:
    """Apply what changes the argmax to ``logits`` [rows, vocab], in place."""
    if (forbidden := batch.forbidden) is not None:
        _forbid(logits, forbidden)
    if (biases := batch.biases) is not None:
        logits[biases.rows, biases.tokens] += biases.values.to(logits)
    if (penalties := batch.repetition_penalties) is not None:
        picked = logits[penalties.rows, penalties.tokens]
        scaled = torch.where(picked > 0, picked / penalties.values, picked * penalties.values)
        logits[penalties.rows, penalties.tokens] = scaled.to(logits)
    if (penalties := batch.output_penalties) is not None:
        logits[penalties.rows, penalties.tokens] -= penalties.values.to(logits)


def _forbid(logits: Tensor, forbidden: ForbiddenTokens) -> None:
    """Set the ``forbidden`` logits to minus infinity, except in rows that would have no token left."""
    rows, tokens = forbidden.rows, forbidden.tokens
    before = logits[rows, tokens]
    logits[rows, tokens] = _MINUS_INFINITY
    asking = logits if len(forbidden.asking) == len(logits) else logits.index_select(0, forbidden.asking)
    is_empty = asking.amax(-1) == _MINUS_INFINITY
    logits[rows, tokens] = torch.where(is_empty[forbidden.places], before, _MINUS_INFINITY)
