"""Paged attention in Triton: pages of any size, grouped heads, one kernel for decoding, chunks and mixtures of both.

The queries of all rows lie in one line [T, heads, d]. A program takes a block of one row's queries, with all heads that
share a head of keys, against a share of that row's context; where contexts are cut into shares, a second kernel puts
these together. What a launch depends on are shapes and numbers that the caller chose, so that a CUDA graph may hold it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
MAX_SPLITS = tl.constexpr(16)


@dataclass(frozen=True)
class Tile:
    """What a program computes: ``queries`` (times heads) against ``keys`` at a time; both powers of two, 16 or more."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def choose_tile(max_query: int, group: int, head_dim: int, itemsize: int, capability: tuple[int, int]) -> Tile:
    """The tile for rows of up to ``max_query`` tokens, ``group`` heads a head of keys, elements of ``itemsize`` bytes.

    Measured on an H200 with Qwen3-0.6B's heads (16 on 8 of 128, bfloat16, pages of 16). Decoding: 64 keys, 4 warps and
    2 stages are the fastest of 49 tiles at 64 and 256 rows (there 89% of the bandwidth of a copy) and at 8 rows of
    8,192 tokens, and within 7% of it elsewhere. Prompts: 64 by 64 is the fastest or 2% behind up to a context of 2,048;
    128 by 128 gains 9% at 8,192, but wants 200 KiB of shared memory and 200 registers, which few GPUs have to give.
    The others are compiled, not measured: the largest found that spill nothing on sm_90 with Triton 3.6 (elsewhere and
    with 3.9 up to 32 bytes), need 200 registers at most (244 for prompts with heads of 256) and less than the 99 KiB of
    shared memory that all have. More than 32 heads a head of keys, in float32, are beyond that: they spill 2 KiB.
    """
    width = max(16, triton.next_power_of_2(head_dim)) * itemsize  # bytes of a key
    lines = triton.next_power_of_2(group)
    if max_query == 1:
        keys, warps = (64, 4) if width <= 256 else (32, 8) if width <= 512 else (16, 8)
        return Tile(max(16, lines), keys, warps, 2)
    # sm_90 and sm_100 multiply out of shared memory; the others out of registers, which hold smaller tiles.
    is_roomy = capability[0] in (9, 10)
    if itemsize == 4:  # without tensor cores
        queries, keys, warps = (64, 32, 8) if width <= 256 else (32, 16, 8)
    elif width <= 128 or (is_roomy and width <= 256):
        queries, keys, warps = 64, 64, 4
    elif width <= 256:
        queries, keys, warps = 64, 32, 4
    else:
        queries, keys, warps = (64, 32, 8) if is_roomy else (32, 16, 4)
    return Tile(max(queries, lines), keys, warps, 2)


def choose_splits(rows: int, tokens: int, max_context: int, kv_heads: int, tile: Tile, group: int, cores: int) -> int:
    """Into how many shares contexts are cut, so that few rows keep all ``cores`` (multiprocessors) busy.

    Four programs a core: at 8 rows of 840 and 8,192 tokens on 132 cores 8 shares were the fastest, at 32 rows 2, from
    64 rows on 1. A share has at least 128 tokens of the longest context.
    """
    programs = kv_heads * max(rows, tokens // (tile.queries // group))
    wanted = min(MAX_SPLITS.value, 4 * cores // programs, max_context // 128)
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1


@triton.jit
def _row_of(starts, block, rows, queries: tl.constexpr):
    """The row that owns ``block``: row r owns those from starts[r] // queries + r to starts[r + 1] // queries + r."""
    low = 0
    high = rows
    while low < high:
        middle = (low + high) // 2
        if tl.load(starts + middle) // queries + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


# Triton compiles anew for an integer that is 1 or a multiple of 16. These change from step to step; the others do not.
@triton.jit(do_not_specialize=["rows", "stride_table"])
def _attention_kernel(
    query, cache, output, part_output, part_max, part_sum,
    starts, contexts, tables, scale, rows,
    stride_query_token, stride_query_head, stride_output_token, stride_output_head,
    stride_page, stride_slot, stride_value, stride_kv_head, stride_table,
    page_size: tl.constexpr, group: tl.constexpr, dim: tl.constexpr, padded_dim: tl.constexpr,
    lines: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """``lines`` of scores, a query and head each, against one share of a row's context, ``keys`` tokens at a time."""
    queries: tl.constexpr = lines // group
    block, kv_head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(2)
    row = _row_of(starts, block, rows, queries)
    start = tl.load(starts + row)
    length = tl.load(starts + row + 1) - start
    context = tl.load(contexts + row)
    first = (block - (start // queries + row)) * queries  # query of the row's
    if first >= length:
        return
    line = tl.arange(0, lines)
    place = first + line // group  # of the line's query in its row
    head = kv_head * group + line % group
    is_real = (line < queries * group) & (place < length)
    dims = tl.arange(0, padded_dim)
    is_dim = dims < dim
    where_query = (start + place).to(tl.int64) * stride_query_token + head * stride_query_head
    q = tl.load(query + where_query[:, None] + dims[None, :], mask=is_real[:, None] & is_dim[None, :], other=0.0)
    visible = context - length + place + 1  # tokens that the line's query sees
    last = tl.minimum(context - length + first + queries, context)  # what the block's last query sees
    size = tl.cdiv(tl.cdiv(last, splits), keys) * keys
    begin = share * size
    end = tl.minimum(last, begin + size)
    best = tl.full([lines], float("-inf"), tl.float32)
    total = tl.zeros([lines], tl.float32)
    weighted = tl.zeros([lines, padded_dim], tl.float32)
    for token in range(begin, end, keys):
        tokens = token + tl.arange(0, keys)
        is_inside = tokens < end
        page = tl.load(tables + row * stride_table + tokens // page_size, mask=is_inside, other=0)
        where = page.to(tl.int64) * stride_page + (tokens % page_size) * stride_slot + kv_head * stride_kv_head
        k = tl.load(cache + where[None, :] + dims[:, None], mask=is_inside[None, :] & is_dim[:, None], other=0.0)
        # "ieee": float32 in full, and not in tf32.
        scores = tl.dot(q, k, input_precision="ieee") * (scale * LOG2E)
        scores = tl.where(is_inside[None, :] & (tokens[None, :] < visible[:, None]), scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        # A line that has seen nothing yet would subtract infinities, which is no number.
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(best - base)
        where_value = where[:, None] + stride_value + dims[None, :]
        v = tl.load(cache + where_value, mask=is_inside[:, None] & is_dim[None, :], other=0.0)
        weighted = tl.dot(weights.to(v.dtype), v, weighted * kept[:, None], input_precision="ieee")
        total = total * kept + tl.sum(weights, 1)
        best = new_best
    is_stored = is_real[:, None] & is_dim[None, :]
    if splits == 1:
        where_output = (start + place).to(tl.int64) * stride_output_token + head * stride_output_head
        value = (weighted / total[:, None]).to(output.dtype.element_ty)
        tl.store(output + where_output[:, None] + dims[None, :], value, mask=is_stored)
    else:
        num_heads = tl.num_programs(1) * group
        where_part = ((start + place).to(tl.int64) * num_heads + head) * splits + share
        tl.store(part_max + where_part, best, mask=is_real)
        tl.store(part_sum + where_part, total, mask=is_real)
        tl.store(part_output + where_part[:, None] * dim + dims[None, :], weighted, mask=is_stored)


@triton.jit(do_not_specialize=["splits"])
def _combine_kernel(
    part_output, part_max, part_sum, output, splits, stride_output_token, stride_output_head,
    dim: tl.constexpr, padded_dim: tl.constexpr,
):  # fmt: skip
    """The shares of one token and head: each is right up to a factor, which its maximum and sum tell."""
    token, head = tl.program_id(0), tl.program_id(1)
    share, dims = tl.arange(0, MAX_SPLITS), tl.arange(0, padded_dim)
    is_share, is_dim = share < splits, dims < dim
    where = (token.to(tl.int64) * tl.num_programs(1) + head) * splits + share
    maxima = tl.load(part_max + where, mask=is_share, other=float("-inf"))
    # The first share has tokens, so that the greatest maximum is a number; a share without any weighs nothing.
    weights = tl.exp2(maxima - tl.max(maxima, 0))
    total = tl.sum(weights * tl.load(part_sum + where, mask=is_share, other=0.0), 0)
    where_part = where[:, None] * dim + dims[None, :]
    parts = tl.load(part_output + where_part, mask=is_share[:, None] & is_dim[None, :], other=0.0)
    value = (tl.sum(parts * weights[:, None], 0) / total).to(output.dtype.element_ty)
    where_output = token.to(tl.int64) * stride_output_token + head * stride_output_head
    tl.store(output + where_output + dims, value, mask=is_dim)


def paged_attention(
    query: Tensor, cache: Tensor, starts: Tensor, contexts: Tensor, tables: Tensor, tile: Tile, splits: int
) -> Tensor:
    """Causal attention of ``query`` [T, heads, d] over ``cache`` [pages, page_size, 2, kv_heads, d]; as the query.

    Row r has the queries from starts[r] to starts[r + 1], the last of ``contexts[r]`` tokens, which lie in the pages
    tables[r]; all three are int32. ``tile`` and ``splits`` (a power of two) say how it is computed, not what.
    """
    tokens, heads, dim = query.shape
    _, page_size, _, kv_heads, _ = cache.shape
    group = heads // kv_heads
    padded_dim = max(16, triton.next_power_of_2(dim))
    rows = len(contexts)
    # Every row may leave its last block unfilled. How many do, only the device knows; a block too many ends at once.
    blocks = tokens // (tile.queries // group) + rows
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    if splits == 1:
        # Nobody writes to it; but of another type, it would have the kernel compiled once more.
        part_output = part_max = part_sum = query.new_empty(1, dtype=torch.float32)
    else:
        part_output = torch.empty(tokens, heads, splits, dim, dtype=torch.float32, device=query.device)
        part_max = torch.empty(tokens, heads, splits, dtype=torch.float32, device=query.device)
        part_sum = torch.empty_like(part_max)
    # Unlike torch, Triton takes the thread's current device, which need not be the tensors'.
    with torch.cuda.device_of(query):
        _attention_kernel[(blocks, kv_heads, splits)](
            query, cache, output, part_output, part_max, part_sum, starts, contexts, tables, dim**-0.5, rows,
            query.stride(0), query.stride(1), output.stride(0), output.stride(1), *cache.stride()[:4], tables.stride(0),
            page_size=page_size, group=group, dim=dim, padded_dim=padded_dim, lines=tile.queries, keys=tile.keys,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if splits > 1:
            _combine_kernel[(tokens, heads)](
                part_output, part_max, part_sum, output, splits, output.stride(0), output.stride(1),
                dim=dim, padded_dim=padded_dim, num_warps=2,
            )  # fmt: skip
    return output
