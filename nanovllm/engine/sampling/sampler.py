"""Sampling: from logits to the next token of every row, with one synchronisation with the device, for the tokens.

A greedy row is the argmax of its own logits, whatever the parameters of other rows. The random numbers of a row with a
seed follow from the seed and the position in the output: they depend neither on the rest of the batch nor on how many
positions a step samples.
"""

from __future__ import annotations

import hashlib
from collections import abc

import torch
from torch import Tensor

from nanovllm.engine.layers.device_copy import move, read_back
from nanovllm.engine.layers.token_ops import argmax
from nanovllm.engine.sampling.sampling_batch import RandomRows, SamplingBatch, TokenValues
from nanovllm.engine.sampling.structured_output import forbid_masked
from nanovllm.engine.scheduling.sequence import Sequence

_MINUS_INFINITY = float("-inf")


class Sampler:
    """Greedy and random sampling with vLLM's parameters, in vLLM's order."""

    def __init__(self, device: torch.device, seed: int | None = None) -> None:
        """``seed`` is for the requests that bring none; None draws one from the system."""
        self._device = device
        self._generator = torch.Generator(device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self._seeded = torch.Generator(device)

    def sample(self, logits: Tensor, sequences: abc.Sequence[Sequence], masks: Tensor | None = None) -> list[int]:
        """The next token of each sequence, from its row of ``logits`` [rows, vocab], which may be overwritten.

        ``masks`` are those of `structured_output.TokenMasks`. A constraint has precedence: where bad words or
        ``min_tokens`` leave no token that it allows, they do not apply.
        """
        batch = SamplingBatch.prepare(sequences, logits.shape[1], self._device)
        if masks is not None:
            forbid_masked(logits, move(masks, logits.device))
        adjust(logits, batch)
        if batch.random is None:
            return read_back(argmax(logits))
        rows = batch.random.rows
        if rows is None:
            return read_back(self._draw(logits.float(), batch.random))
        tokens = argmax(logits)
        tokens.index_copy_(0, rows, self._draw(logits.index_select(0, rows).float(), batch.random))
        return read_back(tokens)

    def _draw(self, logits: Tensor, random: RandomRows) -> Tensor:
        logits = logits / random.temperatures
        if random.min_p is not None:
            floor = logits.amax(-1, keepdim=True) + random.min_p.log()
            logits = logits.masked_fill(logits < floor, _MINUS_INFINITY)
        if random.top_k_p is not None:
            logits = keep_top(logits, *random.top_k_p)
        # Dividing by exponential noise and taking the maximum draws from the distribution without a cumulative sum.
        return (logits.softmax(-1) / self._noise(logits, random.seeds)).argmax(-1)

    def _noise(self, like: Tensor, seeds: abc.Sequence[tuple[int, int] | None]) -> Tensor:
        """Exponential noise: rows with a seed from that and their position, the others from the shared generator."""
        noise = torch.empty_like(like)
        if any(seed is None for seed in seeds):
            noise.exponential_(generator=self._generator)
        for row, seed in enumerate(seeds):
            if seed is not None:
                self._seeded.manual_seed(_seed_of(*seed))
                noise[row].exponential_(generator=self._seeded)
        return noise.clamp_min_(torch.finfo(noise.dtype).tiny)  # a zero would make an impossible token infinite


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


def _forbid(logits: Tensor, forbidden: TokenValues) -> None:
    """Set the ``forbidden`` logits to minus infinity, except in rows that would have no token left."""
    rows, tokens = forbidden.rows, forbidden.tokens
    before = logits[rows, tokens]
    logits[rows, tokens] = _MINUS_INFINITY
    is_empty = logits.amax(-1) == _MINUS_INFINITY
    logits[rows, tokens] = torch.where(is_empty[rows], before, _MINUS_INFINITY)


def keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Drop logits [rows, vocab] beyond the k best or the least set of probability p, not the best; limits [rows, 1]."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    ordered = ordered.masked_fill(ranks >= top_k, _MINUS_INFINITY)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    ordered = ordered.masked_fill((before >= top_p) & (ranks > 0), _MINUS_INFINITY)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def _seed_of(seed: int, position: int) -> int:
    """A seed for one position of an output; hashed, since neighbouring seeds must not give related numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {position}".encode()).digest()[:4])
