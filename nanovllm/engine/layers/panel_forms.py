"""Forms of the product with weights in panels (kernels/panels.cpp, panels_narrow.cpp): which instructions this CPU has.

16-bit numbers without instructions of their own are widened: weights stay in 16 bits, products and sums are float32's.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nanovllm.engine import kernels

_HALVES = (torch.bfloat16, torch.float16)


@functools.cache
def panel_forms() -> Mapping[str, str]:
    """Instructions by the name of a weight's dtype, as "FMA (AVX2)"; empty without kernels.

    bfloat16 and float16 are missing where they are widened.
    """
    return {} if kernels.missing() is not None else dict(torch.ops.nanovllm.panel_forms())


def is_emulated(dtype: torch.dtype) -> bool:
    """Whether torch's own products in ``dtype`` are slow here, because this CPU has no instructions for them."""
    if dtype not in _HALVES:
        return False
    if platform.machine() == "x86_64" and kernels.kind() != "AVX512":
        return True
    if dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    has_instructions = platform.machine() != "x86_64" or torch.cpu._is_avx512_bf16_supported()
    return not (has_instructions and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def name_of(dtype: torch.dtype) -> str:
    """The dtype's name without torch's: float32."""
    return str(dtype).removeprefix("torch.")


def is_wide(dtype: torch.dtype) -> bool:
    """Whether kernels/panels.cpp multiplies by weights of ``dtype`` under inputs of it, or under any inputs in int8."""
    return panel_forms().get(name_of(dtype), "").endswith("(AVX-512)")


def panel_product(panels: Tensor, width: int, per_output: Sequence[Tensor | None]) -> Callable[[Tensor], Tensor]:
    """Multiply by panels [panels, steps, 48, n] of a weight with ``width`` outputs, where that is not `is_wide`.

    ``per_output``: bias, scales and excess, each [48 * panels] or None.
    """
    if panels.dtype == torch.int8:
        return lambda x: torch.ops.nanovllm.multiply_narrow_panels(x.contiguous(), panels, width, *per_output)
    operators = torch.ops.nanovllm
    multiply = operators.multiply_panels if is_wide(torch.float32) else operators.multiply_narrow_panels
    # Inputs in float32 pass through both conversions as they are.
    return lambda x: multiply(x.float().contiguous(), panels, width, *per_output).to(x.dtype)
