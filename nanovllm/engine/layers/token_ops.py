"""Token-wise operations of a layer: by our kernels where a CPU or GPU has them, by torch's operators elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.engine import kernels
from nanovllm.engine.layers import fused

Rotary = tuple[Tensor, Tensor]  # cosine and signed sine [T, 1, d]: the sine of the first half comes negative


class CacheSlots(NamedTuple):
    """A layer's keys and values [num_slots, kv_heads, d], and the slot of every token of a step [T] int64."""

    keys: Tensor
    values: Tensor
    slots: Tensor

    def write(self, key: Tensor, value: Tensor) -> None:
        """Store ``key`` and ``value`` [T, kv_heads, d], each token's in its slot."""
        self.keys.index_copy_(0, self.slots, key)
        self.values.index_copy_(0, self.slots, value)


def add_rms_norm(residual: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add ``update`` [T, d], if there is one, to ``residual`` [T, d] in place.

    Returns the rows of the sum scaled to unit root mean square, then by ``weight`` [d].
    """
    if _has_kernel(residual):
        return torch.ops.nanovllm.add_rms_norm(residual, update, weight, eps)
    if fused.serves(residual):
        from nanovllm.engine.kernels import norm_triton

        return norm_triton.add_rms_norm(residual, update, weight, eps)
    if update is not None:
        residual.add_(update)
    return F.rms_norm(residual, weight.shape, weight, eps)


def rotate_heads(x: Tensor, norm: Tensor | None, eps: float, rotary: Rotary) -> Tensor:
    """Heads [T, heads, d], normalised by ``norm`` [heads, d] if there is one, then rotated to their positions.

    Halves (a, b) of a head become (a cos - b sin, b cos + a sin).
    """
    cos, signed_sin = rotary
    if _has_kernel(x):
        return torch.ops.nanovllm.rotate_heads(x, norm, eps, cos, signed_sin)
    if norm is not None:
        x = F.rms_norm(x, x.shape[-1:], None, eps) * norm
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


def rotate_and_write(qkv: Tensor, norm: Tensor | None, eps: float, rotary: Rotary, cache: CacheSlots) -> Tensor:
    """`rotate_heads` of the queries and keys in ``qkv`` [T, heads + 2 kv_heads, d]; returns the queries [T, heads, d].

    The keys, and the values as they are, go to their slots of the ``cache``.
    """
    if fused.serves(qkv):
        from nanovllm.engine.kernels import rotary_triton

        return rotary_triton.rotate_and_write(qkv, norm, eps, *rotary, *cache)
    kv_heads = cache.keys.shape[1]
    qk, value = qkv.tensor_split((-kv_heads,), 1)
    query, key = rotate_heads(qk, norm, eps, rotary).tensor_split((-kv_heads,), 1)
    cache.write(key, value)
    return query


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [T, 2 d], as [T, d]."""
    if _has_kernel(gate_up):
        return torch.ops.nanovllm.gated_silu(gate_up)
    if fused.serves(gate_up):
        from nanovllm.engine.kernels import silu_triton

        return silu_triton.gated_silu(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def scale_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [T, d] divided by their largest magnitudes, and those [T, 1]; both float32."""
    if _has_kernel(x):
        return torch.ops.nanovllm.scale_rows(x)
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    return x / largest, largest


def argmax(x: Tensor) -> Tensor:
    """The first index of the highest number in each row of [rows, d]: [rows], int64."""
    if x.is_cpu and x.is_contiguous() and kernels.missing() is None:
        return torch.ops.nanovllm.argmax(x)
    return x.argmax(-1)


def _has_kernel(x: Tensor) -> bool:
    return x.is_cpu and x.shape[-1] % 32 == 0 and kernels.missing() is None
