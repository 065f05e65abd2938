"""The random draw of a token from each row of logits, with noise that follows from a key and a position alone.

On a CPU our kernel finds the limits without sorting; torch's operators compute the same elsewhere. Tokens are drawn as
the highest sum of a logit and Gumbel noise, which needs no cumulative sum and leaves out tokens that cannot win.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.engine import kernels
from nanovllm.engine.sampling.sampling_batch import RandomRows

_MINUS_INFINITY = float("-inf")
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_BLOCK = 64  # tokens that share 16 counters, each of which gives four words


def draw_tokens(logits: Tensor, random: RandomRows) -> Tensor:
    """A token of each of the ``random`` rows of ``logits`` [rows, vocab], int64 [random rows]."""
    if logits.is_cpu and logits.is_contiguous() and kernels.missing() is None:
        tokens: Tensor = torch.ops.nanovllm.draw_tokens(logits, random.rows, random.limits, random.keys)
        return tokens
    return draw_by_torch(logits.index_select(0, random.rows), random.limits, random.keys)


def draw_by_torch(logits: Tensor, limits: Tensor, keys: Tensor) -> Tensor:
    """A token of each row of ``logits`` [rows, vocab]; ``limits`` and ``keys`` as in `RandomRows`."""
    inverse_temperatures, min_p, top_p = limits.unsqueeze(-1).unbind(1)
    seeds, positions, top_k = keys.unsqueeze(-1).unbind(1)
    scaled = logits.float() * inverse_temperatures
    kept = scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + min_p.log(), _MINUS_INFINITY)
    kept = keep_top(kept, top_k, top_p)
    return (kept + gumbel_noise(seeds, positions, logits.shape[1])).argmax(-1)


def keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Drop logits [rows, vocab] beyond the k best or the least set of probability p, not the best; limits [rows, 1]."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    ordered = ordered.masked_fill(ranks >= top_k, _MINUS_INFINITY)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    ordered = ordered.masked_fill((before >= top_p) & (ranks > 0), _MINUS_INFINITY)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel noise of every token [rows, vocab], float32, from ``seeds`` and ``positions``, int64 [rows, 1]."""
    tokens = torch.arange(vocab_size, device=seeds.device)
    counters = tokens // _BLOCK * 16 + tokens % 16
    words = torch.stack(philox(seeds, counters, positions))
    which = (tokens % _BLOCK // 16).expand(1, len(seeds), -1)
    uniform = ((words.gather(0, which)[0] >> 1).float() + 0.5) * 2.0**-31
    return -(-(-uniform.clamp(max=1 - 2.0**-24)).log1p()).log()


def philox(seeds: Tensor, counters: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al., SC 2011): four words of 32 random bits, int64, of each counter and position.

    ``seeds`` are the key, 64 bits; all three are int64 and broadcast.
    """
    shape = torch.broadcast_shapes(seeds.shape, counters.shape, positions.shape)
    zero = counters.new_zeros(shape)
    first, second, third, fourth = counters.expand(shape), (positions & _WORD).expand(shape), zero, zero
    low, high = seeds & _WORD, (seeds >> 32) & _WORD
    for _ in range(10):
        one, other = first * _MULTIPLIERS[0], third * _MULTIPLIERS[1]  # wraps modulo 2^64, as it should
        first = ((other >> 32) & _WORD) ^ second ^ low
        third = ((one >> 32) & _WORD) ^ fourth ^ high
        second, fourth = other & _WORD, one & _WORD
        low, high = (low + _KEY_STEPS[0]) & _WORD, (high + _KEY_STEPS[1]) & _WORD
    return first, second, third, fourth
