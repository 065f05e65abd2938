"""Gated SiLU in one Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # columns of a program


@triton.jit
def _silu_kernel(gate_up, output, stride_gate_up, stride_output, size: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    is_column = column < size
    where = gate_up + row * stride_gate_up + column
    gate = tl.load(where, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(where + size, mask=is_column, other=0.0).to(tl.float32)
    stored = output.dtype.element_ty
    activated = (gate / (1.0 + tl.exp(-gate))).to(stored).to(tl.float32)  # rounded as between torch's two operators
    tl.store(output + row * stride_output + column, (activated * up).to(stored), mask=is_column)


def gated_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [T, 2 d], as [T, d]; rows may be strided, their elements are dense."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty(tokens, size)
    block = min(_BLOCK, triton.next_power_of_2(size))
    # Unlike torch, Triton takes the thread's current device, which need not be the tensors'.
    with torch.cuda.device_of(gate_up):
        _silu_kernel[(tokens, triton.cdiv(size, block))](
            gate_up, output, gate_up.stride(0), output.stride(0), size=size, block=block, num_warps=4
        )
    return output
