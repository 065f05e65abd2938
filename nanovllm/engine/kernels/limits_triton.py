"""Limits of sampling in Triton: the last token that ``top_k`` and ``top_p`` keep, without sorting a row of logits.

The tokens that are kept come first in the order of logits, equal ones in the order of tokens, so they end at one logit.
16 thresholds at a time are held against the tokens: twice by all programs of a row, each of which reads a share of it,
then by one program against the tokens that are left between two thresholds. Sums of probabilities are integers, so that
no result depends on the number of shares.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PLAIN = ["rows", "limits", "keys"]  # parts of larger tensors, whose alignment changes with the number of rows
_BLOCK = 256  # tokens that a program holds against all thresholds
_LEAST = tl.constexpr(-3.4028234663852886e38)  # the least float32
_REACH = tl.constexpr(32.0)  # a token so far below the best has less than 1e-13 of its probability
_PIVOTS = tl.constexpr(16)
_FRACTION = tl.constexpr(1 << 36)  # the best token's mass
_COUNT = tl.constexpr(1 << 50)  # above the masses of the tokens that a lane may sum up


@triton.jit
def scaled(line, tokens, is_there, scale):
    """Logits over the temperature, float32; minus infinity for what is no number."""
    value = tl.load(line + tokens, mask=is_there, other=float("-inf")).to(tl.float32) * scale
    return tl.where(value == value, value, float("-inf"))


@triton.jit
def _key(value):
    """uint32 in the order of float32; the two zeros are one."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _value_of(key):
    bits = (key ^ 0x80000000).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _mass(value, best):
    return (tl.exp(value - best) * _FRACTION).to(tl.int64)


@triton.jit
def split_number(x):
    """f and e of a positive x = (1 + f) 2^e, where 1 + f is between the roots of 1/2 and of 2."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    return (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0, exponent.to(tl.float32)


@triton.jit
def log_of(f, exponent):
    """The logarithm of (1 + f) 2^exponent, by the series of the inverse hyperbolic tangent; Triton's own is coarse."""
    s = f / (2.0 + f)
    z = s * s
    series = z * (1.0 / 3 + z * (1.0 / 5 + z * (1.0 / 7 + z * (1.0 / 9))))
    return 2.0 * (s + s * series) + exponent * 0.6931471805599453


@triton.jit
def best_of(bests, row, parts, padded: tl.constexpr):
    """The highest logit of a row, from its shares'."""
    part = tl.arange(0, padded)
    return tl.max(tl.load(bests + row * parts + part, mask=part < parts, other=float("-inf")), 0)


@triton.jit
def floor_of(best, min_p):
    """The least logit that ``min_p`` keeps."""
    f, exponent = split_number(tl.maximum(min_p, 1e-30))
    return tl.where(min_p > 0.0, best + log_of(f, exponent), float("-inf"))


@triton.jit
def _wanted(total, top_p):
    """The least integer that is not below ``top_p`` of ``total``."""
    share = total.to(tl.float64) * top_p.to(tl.float64)
    whole = share.to(tl.int64)
    return whole + (whole.to(tl.float64) < share).to(tl.int64)


@triton.jit
def _sums_of(sums, row, pass_, kind, parts, padded: tl.constexpr):
    """Counts (kind 0) or masses (1) at or above each threshold of a pass, of a row's shares: [padded, _PIVOTS]."""
    part = tl.arange(0, padded)
    where = ((row * 4 + pass_ * 2 + kind) * parts + part)[:, None] * _PIVOTS + tl.arange(0, _PIVOTS)[None, :]
    return tl.load(sums + where, mask=(part < parts)[:, None], other=0)


@triton.jit
def _last_reached(sums, goal):
    """The place of the highest of ascending thresholds whose sum reaches the goal; 0 if none does."""
    return tl.maximum(tl.sum((sums >= goal).to(tl.int32), 0) - 1, 0)


@triton.jit(do_not_specialize_on_alignment=PLAIN)
def _best_kernel(logits, rows, limits, bests, vocab, stride, share: tl.constexpr, block: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    line = logits + tl.load(rows + row) * stride
    scale = tl.load(limits + 3 * row)
    best = tl.full([block], float("-inf"), tl.float32)
    for first in range(part * share, tl.minimum((part + 1) * share, vocab), block):
        tokens = first + tl.arange(0, block)
        best = tl.maximum(best, scaled(line, tokens, tokens < vocab, scale))
    tl.store(bests + row * tl.num_programs(1) + part, tl.max(best, 0))


@triton.jit(do_not_specialize_on_alignment=PLAIN)
def _count_kernel(
    logits, rows, limits, keys, bests, pivots, sums, goals, vocab, stride,
    pass_: tl.constexpr, padded: tl.constexpr, share: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Tokens of a share at or above each threshold, and their mass. The second pass divides what the first one left."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    top_k, top_p = tl.load(keys + 3 * row + 2), tl.load(limits + 3 * row + 2)
    has_top_k = top_k < vocab
    best = best_of(bests, row, parts, padded)
    if ((top_k >= vocab) & (top_p >= 1.0)) | (tl.abs(best) == float("inf")):
        return
    place = tl.arange(0, _PIVOTS)
    own_pivots = pivots + row * 2 * _PIVOTS
    if pass_ == 0:
        # Without top_k no token beyond the reach is looked at, as on a CPU.
        least = tl.maximum(floor_of(best, tl.load(limits + 3 * row + 1)), tl.where(has_top_k, _LEAST, best - _REACH))
        distance = (15 - place).to(tl.float32) / 15.0
        pivot = tl.maximum(best - _REACH * distance * distance, least)
        pivot = tl.where(place == 0, least, tl.where(place == 15, float("inf"), pivot))
    else:
        kind = tl.where(has_top_k, 0, 1)
        reached = tl.sum(_sums_of(sums, row, 0, kind, parts, padded), 0)
        goal = tl.where(has_top_k, top_k, _wanted(tl.max(reached, 0), top_p))
        low_place = _last_reached(reached, goal)
        low, high = tl.load(own_pivots + low_place), tl.load(own_pivots + low_place + 1)
        step = (tl.minimum(high, best) - low) / 15.0
        pivot = tl.minimum(low + step * place.to(tl.float32), high)
        pivot = tl.where(place == 0, low, tl.where(place == 15, high, pivot))
        if part == 0:
            tl.store(goals + row, goal)
    if part == 0:
        tl.store(own_pivots + pass_ * _PIVOTS + place, pivot)
    line = logits + tl.load(rows + row) * stride
    scale = tl.load(limits + 3 * row)
    packed = tl.zeros([block, _PIVOTS], tl.int64)  # a count and a mass in one number
    for first in range(part * share, tl.minimum((part + 1) * share, vocab), block):
        tokens = first + tl.arange(0, block)
        value = scaled(line, tokens, tokens < vocab, scale)
        one = _mass(value, best) + _COUNT
        packed += tl.where(value[:, None] >= pivot[None, :], one[:, None], 0)
    where = (row * 4 + pass_ * 2) * parts * _PIVOTS + part * _PIVOTS + place
    tl.store(sums + where, tl.sum(packed // _COUNT, 0))
    tl.store(sums + where + parts * _PIVOTS, tl.sum(packed % _COUNT, 0))


@triton.jit(do_not_specialize_on_alignment=PLAIN)
def _gather_kernel(
    logits, rows, limits, keys, bests, pivots, sums, goals, found, vocab, stride,
    padded: tl.constexpr, share: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The tokens between the two thresholds that enclose the last one kept; with ``top_k`` all above the lower."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    top_k, top_p = tl.load(keys + 3 * row + 2), tl.load(limits + 3 * row + 2)
    has_top_k = top_k < vocab
    best = best_of(bests, row, parts, padded)
    if ((top_k >= vocab) & (top_p >= 1.0)) | (tl.abs(best) == float("inf")):
        return
    reached = tl.sum(_sums_of(sums, row, 1, tl.where(has_top_k, 0, 1), parts, padded), 0)
    low_place = _last_reached(reached, tl.load(goals + row))
    low = tl.load(pivots + (row * 2 + 1) * _PIVOTS + low_place)
    high = tl.load(pivots + (row * 2 + 1) * _PIVOTS + low_place + 1)
    high = tl.where(has_top_k, float("inf"), high)
    counts = _sums_of(sums, row, 1, 0, parts, padded)
    place = tl.arange(0, _PIVOTS)[None, :]
    inside = tl.where(place == low_place, counts, 0) - tl.where((place == low_place + 1) & ~has_top_k, counts, 0)
    offset = tl.sum(tl.sum(tl.where(tl.arange(0, padded)[:, None] < part, inside, 0), 1), 0)
    line = logits + tl.load(rows + row) * stride
    scale = tl.load(limits + 3 * row)
    own_found = found + row * vocab
    for first in range(part * share, tl.minimum((part + 1) * share, vocab), block):
        tokens = first + tl.arange(0, block)
        value = scaled(line, tokens, tokens < vocab, scale)
        is_inside = (value >= low) & (value < high)
        ranks = tl.cumsum(is_inside.to(tl.int32), 0)
        tl.store(own_found + offset + ranks - 1, tokens, mask=is_inside)
        offset += tl.max(ranks, 0)


@triton.jit
def _sums_above(line, scale, best, found, count, thresholds, block: tl.constexpr):
    """How many of the found tokens are at or above each threshold (uint32 keys), and their masses."""
    packed = tl.zeros([block, _PIVOTS], tl.int64)
    for first in range(0, count, block):
        place = first + tl.arange(0, block)
        is_there = place < count
        token = tl.load(found + place, mask=is_there, other=0)
        value = scaled(line, token, is_there, scale)
        one = tl.where(is_there, _mass(value, best) + _COUNT, 0)
        packed += tl.where(_key(value)[:, None] >= thresholds[None, :], one[:, None], 0)
    return tl.sum(packed // _COUNT, 0), tl.sum(packed % _COUNT, 0)


@triton.jit
def _search(line, scale, best, found, count, low, goal, base, is_mass: tl.constexpr, block: tl.constexpr):
    """The highest key, ``low`` at least, at or above which count or mass reach the goal.

    And how many tokens have it, how many are above it, and their mass with ``base``.
    """
    place = tl.arange(0, _PIVOTS)
    key = low ^ low
    unit = key + (1 << 28)
    for _ in range(8):
        counts, masses = _sums_above(line, scale, best, found, count, key + place.to(tl.uint32) * unit, block)
        reached = _last_reached(masses + base if is_mass else counts, goal)
        key += reached.to(tl.uint32) * unit
        unit = unit >> 4
    key = tl.maximum(key, low)
    # The first threshold is the key itself, the others are the next key.
    counts, masses = _sums_above(line, scale, best, found, count, key + (place > 0).to(tl.uint32), block)
    above = tl.min(counts, 0)
    return key, tl.max(counts, 0) - above, above, tl.min(masses, 0) + base


@triton.jit
def _token_of_tie(line, scale, found, count, key, rank, vocab, block: tl.constexpr):
    """The token that is number ``rank`` of those with the key; ``vocab`` if there are not as many."""
    last = vocab + 0
    seen = 0
    for first in range(0, count, block):
        place = first + tl.arange(0, block)
        is_there = place < count
        token = tl.load(found + place, mask=is_there, other=0)
        is_tie = (_key(scaled(line, token, is_there, scale)) == key) & is_there
        ranks = seen + tl.cumsum(is_tie.to(tl.int32), 0)
        last = tl.minimum(last, tl.min(tl.where(is_tie & (ranks == rank), token, vocab), 0))
        seen = tl.max(ranks, 0)
    return last


@triton.jit(do_not_specialize=["parts"], do_not_specialize_on_alignment=PLAIN)
def _cut_kernel(
    logits, rows, limits, keys, bests, pivots, sums, goals, found, cuts, lasts, vocab, stride, parts,
    padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The least logit of a row that its limits keep, and the last token among those that have it.

    Of a row whose best logit is infinite all are kept, and the first that has it is drawn.
    """
    row = tl.program_id(0).to(tl.int64)
    best = best_of(bests, row, parts, padded)
    tl.store(cuts + row, floor_of(best, tl.load(limits + 3 * row + 1)))
    tl.store(lasts + row, vocab)
    top_k, top_p = tl.load(keys + 3 * row + 2), tl.load(limits + 3 * row + 2)
    has_top_k = top_k < vocab
    if ((top_k >= vocab) & (top_p >= 1.0)) | (tl.abs(best) == float("inf")):
        return
    line = logits + tl.load(rows + row) * stride
    scale = tl.load(limits + 3 * row)
    own_found = found + row * vocab
    goal = tl.load(goals + row)
    reached = tl.sum(_sums_of(sums, row, 1, tl.where(has_top_k, 0, 1), parts, padded), 0)
    low_place = _last_reached(reached, goal)
    low = _key(tl.load(pivots + (row * 2 + 1) * _PIVOTS + low_place))
    place = tl.arange(0, _PIVOTS)
    counts = tl.sum(_sums_of(sums, row, 1, 0, parts, padded), 0)
    count = tl.sum(tl.where(place == low_place, counts, 0), 0).to(tl.int32)
    base = tl.zeros([], tl.int64)
    key = low
    kept = tl.zeros([], tl.int64)  # of the tokens that have the key
    if has_top_k:
        key, ties, above, mass = _search(line, scale, best, own_found, count, low, goal, base, False, block)
        kept = tl.minimum(top_k - above, ties)
        goal = _wanted(mass + kept * _mass(_value_of(key), best), top_p)
    else:
        is_next = place == low_place + 1
        count -= tl.sum(tl.where(is_next, counts, 0), 0).to(tl.int32)
        base = tl.sum(tl.where(is_next, tl.sum(_sums_of(sums, row, 1, 1, parts, padded), 0), 0), 0)
    if top_p < 1.0:
        key, ties, above, mass = _search(line, scale, best, own_found, count, low, goal, base, True, block)
        each = tl.maximum(_mass(_value_of(key), best), 1)
        kept = tl.maximum((goal - mass + each - 1) // each, 1)
    tl.store(cuts + row, _value_of(key))
    tl.store(lasts + row, _token_of_tie(line, scale, own_found, count, key, kept, vocab, block))


def find_bests(logits: Tensor, rows: Tensor, limits: Tensor, share: int) -> Tensor:
    """The highest of each share of the ``rows`` [n] of ``logits`` [all rows, vocab], scaled: float32 [n, shares]."""
    vocab = logits.shape[1]
    bests = torch.empty(len(rows), triton.cdiv(vocab, share), dtype=torch.float32, device=logits.device)
    _best_kernel[tuple(bests.shape)](
        logits, rows, limits, bests, vocab, logits.stride(0),
        share=share, block=min(1024, share), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return bests


def find_cuts(
    logits: Tensor, rows: Tensor, limits: Tensor, keys: Tensor, bests: Tensor, share: int
) -> tuple[Tensor, Tensor]:
    """The least scaled logit that each of the ``rows`` [n] keeps, float32 [n], and the last token with it, int32 [n].

    ``limits`` and ``keys`` are those of `RandomRows`, ``bests`` those of `find_bests`.
    """
    (count, parts), vocab, device = bests.shape, logits.shape[1], logits.device
    cuts = torch.empty(count, dtype=torch.float32, device=device)
    lasts = torch.empty(count, dtype=torch.int32, device=device)
    pivots = torch.empty(count, 2, _PIVOTS.value, dtype=torch.float32, device=device)
    sums = torch.empty(count, 2, 2, parts, _PIVOTS.value, dtype=torch.int64, device=device)
    goals = torch.empty(count, dtype=torch.int64, device=device)
    found = torch.empty(count, vocab, dtype=torch.int32, device=device)
    padded = triton.next_power_of_2(parts)
    tile = {"share": share, "block": min(_BLOCK, share), "num_warps": 4, "enable_fp_fusion": False}
    for pass_ in range(2):
        _count_kernel[count, parts](
            logits, rows, limits, keys, bests, pivots, sums, goals, vocab, logits.stride(0),
            pass_=pass_, padded=padded, **tile,
        )  # fmt: skip
    _gather_kernel[count, parts](
        logits, rows, limits, keys, bests, pivots, sums, goals, found, vocab, logits.stride(0), padded=padded, **tile
    )
    _cut_kernel[(count,)](
        logits, rows, limits, keys, bests, pivots, sums, goals, found, cuts, lasts, vocab, logits.stride(0), parts,
        padded=padded, block=_BLOCK, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return cuts, lasts
