"""Fused Triton kernels of a layer on CUDA: whether they can be used, which a trial at start tells.

Triton comes with torch's CUDA builds and is missing beside others, so that nothing is imported before it is needed.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of :func:`trial`: three times what rounding costs at most."""
_EPS = 1e-6


def serves(x: Tensor) -> bool:
    """Whether the kernels compute what is on the device of ``x``, in its type."""
    return x.is_cuda and why_not(x.device, x.dtype) is None


@functools.cache
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why layers on ``device`` do without the kernels; None if they have them. Called first outside of a capture."""
    if device.type != "cuda":
        return "they are for CUDA"
    try:
        error = trial(device, dtype)
        reason = "" if error <= TOLERANCES[dtype] else f"their numbers are off by {error:.2g}"
    except ModuleNotFoundError as missing:
        reason = f"{missing.name} is not installed"
    except Exception as failure:  # a compiler may raise whatever it likes
        reason = f"{type(failure).__name__}: {failure}"
    if reason:
        logger.warning("layers do without fused kernels: %s", reason)
    return reason or None


@torch.inference_mode()
def trial(device: torch.device, dtype: torch.dtype) -> float:
    """How far off plain torch in float64 the kernels are at worst, of a value or of 1 where that is more; maybe NaN."""
    from nanovllm.engine.kernels.norm_triton import add_rms_norm
    from nanovllm.engine.kernels.rotary_triton import rotate_and_write
    from nanovllm.engine.kernels.silu_triton import gated_silu

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    tokens, heads, kv_heads = 3, 6, 2
    pairs: list[tuple[Tensor, Tensor]] = []
    for dim, norm in ((24, None), (128, draw(heads + kv_heads, 128))):
        qkv, angles = draw(tokens, heads + 2 * kv_heads, dim), draw(tokens, 1, dim // 2)
        cos, signed_sin = (torch.cat(halves, -1) for halves in ((angles.cos(),) * 2, (-angles.sin(), angles.sin())))
        slots = torch.tensor([5, 0, 17], device=device)
        cache = torch.zeros(18, 2, kv_heads, dim, dtype=dtype, device=device)
        keys, values = cache.unbind(1)
        query = rotate_and_write(qkv, norm, _EPS, cos, signed_sin, keys, values, slots)
        expected = qkv.double()
        rotated = expected[:, : heads + kv_heads]
        if norm is not None:
            rotated = F.rms_norm(rotated, (dim,), None, _EPS) * norm
        rotated = rotated * cos + rotated.roll(dim // 2, -1) * signed_sin
        pairs += [(query, rotated[:, :heads]), (keys[slots], rotated[:, heads:])]
        pairs += [(values[slots], expected[:, heads + kv_heads :])]
    for size in (96, 2048):
        residual, update, weight, gate_up = draw(tokens, size), draw(tokens, size), draw(size), draw(tokens, 2 * size)
        total = residual + update
        pairs += [(gated_silu(gate_up), F.silu(gate_up[:, :size].double()) * gate_up[:, size:])]
        pairs += [
            (add_rms_norm(residual, update, weight, _EPS), F.rms_norm(total.double(), (size,), weight.double(), _EPS))
        ]
        pairs += [(residual, total.double())]
    errors = [((found - wanted).abs() / wanted.abs().clamp_min(1.0)).amax() for found, wanted in pairs]
    return float(torch.stack(errors).amax())  # which keeps a NaN
