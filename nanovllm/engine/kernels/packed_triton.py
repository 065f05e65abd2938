"""Attention of packed sequences in Triton: every token of a sequence sees all of its own, and none of the others.

Sequences lie one behind the other in one line [T, heads, d], as the images and windows of a vision tower's batch do. A
program takes a block of one sequence's queries and one head; the host need not know the lengths.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.engine.kernels.paged_triton import LOG2E, Tile, _row_of


@triton.jit(do_not_specialize=["rows"])
def _packed_kernel(
    query, key, value, output, starts, scale, rows,
    stride_query_token, stride_query_head, stride_key_token, stride_key_head, stride_value_token, stride_value_head,
    stride_output_token, stride_output_head,
    group: tl.constexpr, alignment: tl.constexpr, dim: tl.constexpr, padded_dim: tl.constexpr,
    queries: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """``queries`` of a sequence and head against all of the sequence, ``keys`` tokens at a time."""
    block, head = tl.program_id(0), tl.program_id(1)
    row = _row_of(starts, block, rows, queries)
    start = tl.load(starts + row)
    length = tl.load(starts + row + 1) - start
    first = (block - (start // queries + row)) * queries
    if first >= length:
        return
    place = first + tl.arange(0, queries)
    dims = tl.arange(0, padded_dim)
    is_query, is_dim = place < length, dims < dim
    at = (start + place).to(tl.int64)[:, None]
    is_stored = is_query[:, None] & is_dim[None, :]
    # Triton sees by itself that an argument is a multiple of 16, and of no less: heads of 72 would be read one by one.
    query += tl.multiple_of(head * stride_query_head, alignment)
    key += tl.multiple_of(head // group * stride_key_head, alignment)
    value += tl.multiple_of(head // group * stride_value_head, alignment)
    output += tl.multiple_of(head * stride_output_head, alignment)
    q = tl.load(query + at * stride_query_token + dims[None, :], mask=is_stored, other=0.0)
    best = tl.full([queries], float("-inf"), tl.float32)
    total = tl.zeros([queries], tl.float32)
    weighted = tl.zeros([queries, padded_dim], tl.float32)
    for token in range(0, length, keys):
        tokens = token + tl.arange(0, keys)
        is_inside = tokens < length
        where = (start + tokens).to(tl.int64)
        k = tl.load(
            key + where[None, :] * stride_key_token + dims[:, None],
            mask=is_inside[None, :] & is_dim[:, None],
            other=0.0,
        )
        # "ieee": float32 in full, and not in tf32.
        scores = tl.dot(q, k, input_precision="ieee") * (scale * LOG2E)
        scores = tl.where(is_inside[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        kept = tl.exp2(best - new_best)
        v = tl.load(
            value + where[:, None] * stride_value_token + dims[None, :],
            mask=is_inside[:, None] & is_dim[None, :],
            other=0.0,
        )
        weighted = tl.dot(weights.to(v.dtype), v, weighted * kept[:, None], input_precision="ieee")
        total = total * kept + tl.sum(weights, 1)
        best = new_best
    result = (weighted / total[:, None]).to(output.dtype.element_ty)
    tl.store(output + at * stride_output_token + dims[None, :], result, mask=is_stored)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float, tile: Tile) -> Tensor:
    """Attention of ``query`` [T, heads, d] over ``key`` and ``value`` [T, kv_heads, d]; as the query, without gaps.

    Sequence r has the tokens from starts[r] to starts[r + 1], of int32 [sequences + 1], and none is empty. Tokens and
    heads may lie apart, the numbers of a head not. ``tile`` says how it is computed, not what.
    """
    tokens, heads, dim = query.shape
    rows = len(starts) - 1
    # Every sequence may leave its last block unfilled. How many do, only the device knows; one too many ends at once.
    blocks = tokens // tile.queries + rows
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    apart = [part.stride(1) for part in (query, key, value, output)]
    # Unlike torch, Triton takes the thread's current device, which need not be the tensors'.
    with torch.cuda.device_of(query):
        _packed_kernel[(blocks, heads)](
            query, key, value, output, starts, scale, rows,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *output.stride()[:2],
            group=heads // key.shape[1], alignment=gcd(16, *apart),
            dim=dim, padded_dim=max(16, triton.next_power_of_2(dim)), queries=tile.queries, keys=tile.keys,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return output
