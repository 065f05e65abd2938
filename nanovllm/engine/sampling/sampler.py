"""Sampling: from logits to the next token of every row, with one synchronisation with the device, for the tokens.

A greedy row is the argmax of its own logits, whatever the parameters of other rows. The random numbers of a row with a
seed follow from the seed and the position in the output: they depend neither on the rest of the batch nor on how many
positions a step samples.
"""

from __future__ import annotations

import hashlib
from collections import Counter, abc

import torch
from torch import Tensor

from nanovllm.engine.layers.device_copy import move, read_back, to_device
from nanovllm.engine.layers.token_ops import argmax
from nanovllm.engine.sampling.structured_output import forbid_masked
from nanovllm.engine.scheduling.sequence import Sequence

_MINUS_INFINITY = float("-inf")
_MIN_TEMPERATURE = 1e-5  # below it only the best token is left, and float32 would overflow


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
        if masks is not None:
            forbid_masked(logits, move(masks, logits.device))
        self._adjust(logits, sequences)
        random = [row for row, sequence in enumerate(sequences) if not sequence.sampling.is_greedy]
        if not random:
            return read_back(argmax(logits))
        if len(random) == len(sequences):
            return read_back(self._draw(logits.float(), sequences))
        tokens = argmax(logits)
        rows = to_device(random, logits.device)
        drawn = self._draw(logits.index_select(0, rows).float(), [sequences[row] for row in random])
        tokens.index_copy_(0, rows, drawn)
        return read_back(tokens)

    def _adjust(self, logits: Tensor, sequences: abc.Sequence[Sequence]) -> None:
        """Apply what changes the argmax, in place: bad words, minimum length, biases, penalties."""
        for row, sequence in enumerate(sequences):
            params = sequence.sampling
            forbidden = [word[-1] for word in sequence.bad_words if _would_complete(word, sequence)]
            if sequence.num_output_tokens < params.min_tokens:
                forbidden += sequence.stop_token_ids
            if forbidden:
                indices = to_device(sorted(set(forbidden)), self._device)
                before = logits[row, indices]
                logits[row, indices] = _MINUS_INFINITY
                logits[row, indices] = torch.where(logits[row].amax() == _MINUS_INFINITY, before, _MINUS_INFINITY)
            if params.logit_bias:
                indices = to_device(list(params.logit_bias), self._device)
                logits[row, indices] += to_device(list(params.logit_bias.values()), self._device).to(logits)
            if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
                self._penalise(logits[row], sequence)

    def _penalise(self, logits: Tensor, sequence: Sequence) -> None:
        """Penalties of one row [vocab], in place: repetition over prompt and output (Keskar et al. 2019), the others
        over the output alone.
        """
        params = sequence.sampling
        if params.repetition_penalty != 1.0:
            # An image token may lie beyond the vocabulary.
            known = [token for token in set(sequence.token_ids) if token < len(logits)]
            seen = to_device(known, self._device, torch.int64)
            picked = logits[seen]
            penalty = params.repetition_penalty
            logits[seen] = torch.where(picked > 0, picked / penalty, picked * penalty)
        if (params.presence_penalty or params.frequency_penalty) and sequence.num_output_tokens:
            counts = Counter(sequence.output_token_ids)
            penalties = [params.presence_penalty + params.frequency_penalty * count for count in counts.values()]
            logits[to_device(list(counts), self._device)] -= to_device(penalties, self._device).to(logits)

    def _draw(self, logits: Tensor, sequences: abc.Sequence[Sequence]) -> Tensor:
        params = [sequence.sampling for sequence in sequences]
        logits = logits / self._column([max(param.temperature, _MIN_TEMPERATURE) for param in params])
        if any(param.min_p > 0.0 for param in params):
            floor = logits.amax(-1, keepdim=True) + self._column([param.min_p for param in params]).log()
            logits = logits.masked_fill(logits < floor, _MINUS_INFINITY)
        if any(param.top_k > 0 or param.top_p < 1.0 for param in params):
            logits = self._keep_top(logits, [param.top_k for param in params], [param.top_p for param in params])
        # Dividing by exponential noise and taking the maximum draws from the distribution without a cumulative sum.
        return (logits.softmax(-1) / self._noise(logits, sequences)).argmax(-1)

    def _keep_top(self, logits: Tensor, top_k: list[int], top_p: list[float]) -> Tensor:
        """Drop what is outside the k best, then outside the smallest set of probability p; the best one stays."""
        vocab = logits.shape[-1]
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(vocab, device=logits.device)
        limits = self._column([min(k, vocab) if k > 0 else vocab for k in top_k])
        ordered = ordered.masked_fill(ranks >= limits, _MINUS_INFINITY)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        limits = self._column([p if p < 1.0 else 2.0 for p in top_p])  # rounding may sum to more than one
        ordered = ordered.masked_fill((before >= limits) & (ranks > 0), _MINUS_INFINITY)
        return torch.empty_like(logits).scatter_(-1, order, ordered)

    def _noise(self, like: Tensor, sequences: abc.Sequence[Sequence]) -> Tensor:
        """Exponential noise: rows with a seed from that and their position, the others from the shared generator."""
        noise = torch.empty_like(like)
        if any(sequence.seed is None for sequence in sequences):
            noise.exponential_(generator=self._generator)
        for row, sequence in enumerate(sequences):
            if sequence.seed is not None:
                self._seeded.manual_seed(_seed_of(sequence.seed, sequence.num_output_tokens))
                noise[row].exponential_(generator=self._seeded)
        return noise.clamp_min_(torch.finfo(noise.dtype).tiny)  # a zero would make an impossible token infinite

    def _column(self, values: list[float] | list[int]) -> Tensor:
        return to_device(values, self._device, torch.float32).unsqueeze(1)


def _seed_of(seed: int, position: int) -> int:
    """A seed for one position of an output; hashed, since neighbouring seeds must not give related numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed} {position}".encode()).digest()[:4])


def _would_complete(word: tuple[int, ...], sequence: Sequence) -> bool:
    """Whether the output ends with all of a bad word but its last token."""
    begun = len(word) - 1
    return begun == 0 or (begun <= sequence.num_output_tokens and tuple(sequence.token_ids[-begun:]) == word[:-1])
