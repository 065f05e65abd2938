"""Norm and rotation of heads, and the write of keys and values to their slots of the cache, in one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 512  # of half a head each, in a program: 4 warps read and write them as vectors


@triton.jit
def _rotate_kernel(
    qkv, norm, cos, signed_sin, slots, query, keys, values, eps,
    stride_token, stride_head, stride_cos, stride_sin, stride_key_slot, stride_key_head, stride_value_slot,
    stride_value_head,
    heads: tl.constexpr, kv_heads: tl.constexpr, half: tl.constexpr, padded_half: tl.constexpr, block: tl.constexpr,
    has_norm: tl.constexpr,
):  # fmt: skip
    """``block`` heads of one token, as their lower and their upper halves."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * block + tl.arange(0, block))[:, None]
    dims = tl.arange(0, padded_half)[None, :]
    is_dim = dims < half
    is_query, is_rotated = (head < heads) & is_dim, (head < heads + kv_heads) & is_dim
    is_there = (head < heads + 2 * kv_heads) & is_dim
    where = qkv + token * stride_token + head * stride_head + dims
    low_value = tl.load(where, mask=is_there, other=0.0)
    high_value = tl.load(where + half, mask=is_there, other=0.0)
    stored = qkv.dtype.element_ty
    low, high = low_value.to(tl.float32), high_value.to(tl.float32)
    # Rounded as between torch's operators: after the norm, after its weight, and after the first product.
    if has_norm:
        factor = tl.rsqrt(tl.sum(low * low + high * high, 1) / (2 * half) + eps)[:, None]
        where_norm = norm + head * (2 * half) + dims
        low_scale = tl.load(where_norm, mask=is_rotated, other=0.0).to(tl.float32)
        high_scale = tl.load(where_norm + half, mask=is_rotated, other=0.0).to(tl.float32)
        low = ((low * factor).to(stored).to(tl.float32) * low_scale).to(stored).to(tl.float32)
        high = ((high * factor).to(stored).to(tl.float32) * high_scale).to(stored).to(tl.float32)
    cosine = tl.load(cos + token * stride_cos + dims, mask=is_dim, other=0.0).to(tl.float32)
    sine = tl.load(signed_sin + token * stride_sin + half + dims, mask=is_dim, other=0.0).to(tl.float32)
    low_rotated = ((low * cosine).to(stored).to(tl.float32) - high * sine).to(stored)
    high_rotated = ((high * cosine).to(stored).to(tl.float32) + low * sine).to(stored)
    where_query = query + (token * heads + head) * (2 * half) + dims
    tl.store(where_query, low_rotated, mask=is_query)
    tl.store(where_query + half, high_rotated, mask=is_query)
    slot = tl.load(slots + token).to(tl.int64)
    is_key = is_rotated & (head >= heads)
    where_key = keys + slot * stride_key_slot + (head - heads) * stride_key_head + dims
    tl.store(where_key, low_rotated, mask=is_key)
    tl.store(where_key + half, high_rotated, mask=is_key)
    is_value = is_there & (head >= heads + kv_heads)
    where_value = values + slot * stride_value_slot + (head - heads - kv_heads) * stride_value_head + dims
    tl.store(where_value, low_value, mask=is_value)
    tl.store(where_value + half, high_value, mask=is_value)


def rotate_and_write(
    qkv: Tensor, norm: Tensor | None, eps: float, cos: Tensor, signed_sin: Tensor,
    keys: Tensor, values: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """Rotate the queries and keys of ``qkv`` [T, heads + 2 kv_heads, d]; keys and values go to the cache.

    Queries and keys are normalised first where there is a ``norm`` [heads + kv_heads, d], dense. ``cos`` and
    ``signed_sin`` are [T, 1, d], the sine of the first half negative. ``keys`` and ``values`` [num_slots, kv_heads, d]
    get the step's at ``slots`` [T], each token at its own. Of all but ``norm`` only the last dimension has to be dense.
    Returns the queries [T, heads, d].
    """
    tokens, total, dim = qkv.shape
    kv_heads = keys.shape[1]
    heads, half = total - 2 * kv_heads, dim // 2
    padded_half = triton.next_power_of_2(half)
    block = min(triton.next_power_of_2(total), max(1, _ELEMENTS // padded_half))
    query = qkv.new_empty(tokens, heads, dim)
    # Unlike torch, Triton takes the thread's current device, which need not be the tensors'.
    with torch.cuda.device_of(qkv):
        _rotate_kernel[(tokens, triton.cdiv(total, block))](
            qkv, qkv if norm is None else norm, cos, signed_sin, slots, query, keys, values, eps,
            qkv.stride(0), qkv.stride(1), cos.stride(0), signed_sin.stride(0),
            *keys.stride()[:2], *values.stride()[:2],
            heads=heads, kv_heads=kv_heads, half=half, padded_half=padded_half, block=block,
            has_norm=norm is not None, num_warps=4,
        )  # fmt: skip
    return query
