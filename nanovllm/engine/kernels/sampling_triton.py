"""Sampling in Triton: the tokens that the CPU's kernel draws, from the same limits and the same random bits.

A row is cut into shares, each of which a program reads, and a last program chooses among their best tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.engine.kernels.limits_triton import (
    PLAIN,
    best_of,
    find_bests,
    find_cuts,
    floor_of,
    log_of,
    scaled,
    split_number,
)

_COUNTERS = 256  # of the generator, in a step of a program; each gives noise to four tokens
_WORDS = 64  # of masks, in a program
_LARGE_BATCH = 16  # rows, from which on there are programs enough when each reads much


@triton.jit
def _gumbel(word):
    """A Gumbel variate of the upper 31 of 32 random bits: minus the logarithm of an exponential variate."""
    uniform = ((word >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    uniform = tl.minimum(uniform, 0.99999994)  # 1 - 2^-24
    f, exponent = split_number(1.0 - uniform)
    is_small = uniform < 0.25  # where 1 - uniform would round away its digits
    exponential = -log_of(tl.where(is_small, -uniform, f), tl.where(is_small, 0.0, exponent))
    f, exponent = split_number(exponential)
    return -log_of(f, exponent)


@triton.jit(do_not_specialize_on_alignment=PLAIN)
def _draw_kernel(
    logits, rows, limits, keys, bests, cuts, lasts, scores, tokens, vocab, stride,
    is_limited: tl.constexpr, is_searched: tl.constexpr, padded: tl.constexpr, share: tl.constexpr,
    counters: tl.constexpr,
):  # fmt: skip
    """The highest sum of a logit and its noise in a share. Four tokens, 16 apart, take their noise from one counter."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    line = logits + tl.load(rows + row) * stride
    scale = tl.load(limits + 3 * row)
    seed, position = tl.load(keys + 3 * row), tl.load(keys + 3 * row + 1)
    cut, last = float("-inf"), vocab
    if is_searched:
        cut, last = tl.load(cuts + row), tl.load(lasts + row)
    elif is_limited:
        cut = floor_of(best_of(bests, row, tl.num_programs(1), padded), tl.load(limits + 3 * row + 1))
    best = tl.full([counters], float("-inf"), tl.float32)
    best_token = tl.full([counters], 0x7FFFFFFF, tl.int32)
    for first in range(part * share, tl.minimum((part + 1) * share, vocab), 4 * counters):
        counter = first // 4 + tl.arange(0, counters)
        zero = tl.zeros([counters], tl.uint32)
        words = tl.philox(seed, counter.to(tl.uint32), zero + position.to(tl.uint32), zero, zero)
        for word in tl.static_range(4):
            token = counter // 16 * 64 + word * 16 + counter % 16
            is_there = token < vocab
            value = scaled(line, token, is_there, scale)
            is_kept = (value > cut) | ((value == cut) & (token <= last))
            score = tl.where(is_kept, value + _gumbel(words[word]), float("-inf"))
            is_better = is_there & ((score > best) | ((score == best) & (token < best_token)))
            best = tl.where(is_better, score, best)
            best_token = tl.where(is_better, token, best_token)
    highest = tl.max(best, 0)
    where = row * tl.num_programs(1) + part
    tl.store(scores + where, highest)
    tl.store(tokens + where, tl.min(tl.where(best == highest, best_token, 0x7FFFFFFF), 0))


@triton.jit(do_not_specialize=["parts"])
def _combine_kernel(scores, tokens, drawn, parts, padded: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, padded)
    is_part = part < parts
    score = tl.load(scores + row * parts + part, mask=is_part, other=float("-inf"))
    token = tl.load(tokens + row * parts + part, mask=is_part, other=0x7FFFFFFF)
    tl.store(drawn + row, tl.min(tl.where(score == tl.max(score, 0), token, 0x7FFFFFFF), 0).to(tl.int64))


@triton.jit(do_not_specialize_on_alignment=PLAIN)
def _forbid_kernel(logits, rows, masks, vocab, stride, count: tl.constexpr, words: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * words + tl.arange(0, words)
    bits = tl.load(masks + row * count + word, mask=word < count, other=-1)
    bit = tl.arange(0, 32)[None, :]
    token = word[:, None] * 32 + bit
    is_forbidden = (((bits[:, None] >> bit) & 1) == 0) & (token < vocab)
    infinity = tl.full([words, 32], float("-inf"), tl.float32).to(logits.dtype.element_ty)
    tl.store(logits + tl.load(rows + row) * stride + token, infinity, mask=is_forbidden)


def draw_tokens(
    logits: Tensor,
    rows: Tensor,
    limits: Tensor,
    keys: Tensor,
    *,
    is_limited: bool = True,
    is_searched: bool = True,
    share: int | None = None,
) -> Tensor:
    """A token of each of the ``rows`` [n] of ``logits`` [all rows, vocab], int64 [n].

    A row of logits is dense. ``limits`` and ``keys`` are those of `RandomRows`. Not ``is_limited``: no row has
    ``min_p``, ``top_k`` or ``top_p``; not ``is_searched``: none has the last two. ``share``: the tokens that a program
    reads, a multiple of 64; no result depends on it.
    """
    count, vocab = len(rows), logits.shape[1]
    share = share or (4096 if count < _LARGE_BATCH else 16384)
    parts = triton.cdiv(vocab, share)
    padded = triton.next_power_of_2(parts)
    scores = torch.empty(count, parts, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(count, parts, dtype=torch.int32, device=logits.device)
    drawn = torch.empty(count, dtype=torch.int64, device=logits.device)
    bests = cuts = scores  # where nothing is limited, nothing reads these
    lasts = tokens
    # Unlike torch, Triton takes the thread's current device, which need not be the tensors'.
    with torch.cuda.device_of(logits):
        if is_limited or is_searched:
            bests = find_bests(logits, rows, limits, share)
        if is_searched:
            cuts, lasts = find_cuts(logits, rows, limits, keys, bests, share)
        _draw_kernel[count, parts](
            logits, rows, limits, keys, bests, cuts, lasts, scores, tokens, vocab, logits.stride(0),
            is_limited=is_limited, is_searched=is_searched, padded=padded, share=share,
            counters=min(_COUNTERS, share // 4), num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        _combine_kernel[(count,)](scores, tokens, drawn, parts, padded=padded, num_warps=1, enable_fp_fusion=False)
    return drawn


def forbid_masked(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Set the logits of the ``rows`` [n] whose bit in ``masks`` [n, words], int32, is 0 to minus infinity, in place."""
    count, words = masks.shape
    with torch.cuda.device_of(logits):
        _forbid_kernel[count, triton.cdiv(words, _WORDS)](
            logits, rows, masks, logits.shape[1], logits.stride(0),
            count=words, words=_WORDS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
