"""Token-wise operations of a layer: by our kernels on a CPU that has them, by torch's operators elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.engine import kernels

Rotary = tuple[Tensor, Tensor]  # cosine and signed sine [T, 1, d]: the sine of the first half comes negative


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale rows [T, d] to unit root mean square, then by ``weight`` [d]."""
    if _has_kernel(x):
        return torch.ops.nanovllm.rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


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


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [T, 2 d], as [T, d]."""
    if _has_kernel(gate_up):
        return torch.ops.nanovllm.gated_silu(gate_up)
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
