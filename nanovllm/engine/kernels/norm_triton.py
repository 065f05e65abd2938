"""Residual sum and RMSNorm in one Triton launch: a program a row, which it reads once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_kernel(
    residual, update, weight, output, eps, stride_residual, stride_update, stride_output,
    size: tl.constexpr, padded_size: tl.constexpr, has_update: tl.constexpr,
):  # fmt: skip
    row, dims = tl.program_id(0).to(tl.int64), tl.arange(0, padded_size)
    is_dim = dims < size
    where = residual + row * stride_residual + dims
    x = tl.load(where, mask=is_dim, other=0.0).to(tl.float32)
    if has_update:
        x += tl.load(update + row * stride_update + dims, mask=is_dim, other=0.0).to(tl.float32)
        rounded = x.to(residual.dtype.element_ty)
        tl.store(where, rounded, mask=is_dim)
        x = rounded.to(tl.float32)  # torch normalises what it stored, too
    factor = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    scale = tl.load(weight + dims, mask=is_dim, other=0.0).to(tl.float32)
    tl.store(output + row * stride_output + dims, (x * factor * scale).to(output.dtype.element_ty), mask=is_dim)


def add_rms_norm(residual: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add ``update`` [T, d], if there is one, to ``residual`` [T, d] in place; returns rms(residual) * weight [T, d].

    Rows may be strided, their elements are dense; ``weight`` [d] is dense.
    """
    tokens, size = residual.shape
    padded_size = triton.next_power_of_2(size)
    output = torch.empty_like(residual, memory_format=torch.contiguous_format)
    added = residual if update is None else update
    # Unlike torch, Triton takes the thread's current device, which need not be the tensors'.
    with torch.cuda.device_of(residual):
        _norm_kernel[(tokens,)](
            residual, added, weight, output, eps, residual.stride(0), added.stride(0), output.stride(0),
            size=size, padded_size=padded_size, has_update=update is not None,
            num_warps=min(16, max(1, padded_size // 256)),
        )  # fmt: skip
    return output
