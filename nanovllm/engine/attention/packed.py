"""Attention for vision towers on CUDA: our Triton kernel over packed sequences, if it is right."""

from __future__ import annotations

import logging
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from nanovllm.engine.attention.selection import TOLERANCES

logger = logging.getLogger(__name__)

SEQUENCES = (1, 4, 16, 63, 64, 65, 3, 200)
"""Tokens of the trial's: below, at and above a block of queries, and several blocks."""


class TritonPackedAttention:
    """See `nanovllm.vision.encoders.packed_attention.PackedAttention`."""

    def __init__(self, device: torch.device) -> None:
        """Raises ModuleNotFoundError without Triton. On a CPU the kernel runs in Triton's interpreter."""
        from nanovllm.engine.kernels import packed_triton, paged_triton

        self._attention, self._choose_tile = packed_triton.packed_attention, paged_triton.choose_tile
        self._capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> Tensor:
        """[T, heads, d] each → the same; sequence r has the tokens from starts[r] (int32) to starts[r + 1]."""
        tile = self._choose_tile(max(2, len(query)), 1, query.shape[-1], query.element_size(), self._capability)
        return self._attention(query, key, value, starts, scale, tile)


def choose_packed_attention(
    heads: set[tuple[int, int]], device: torch.device, dtype: torch.dtype
) -> TritonPackedAttention | None:
    """The kernel for layers of these ``heads`` (number, size), where Triton is there and the kernel passes its trial.

    None, with a warning if the kernel fails: transformers' own attention serves then.
    """
    if not heads:
        return None
    try:
        attention = TritonPackedAttention(device)
        errors = [packed_trial(attention, num, dim, device, dtype) for num, dim in sorted(heads)]
    except ModuleNotFoundError as missing:
        if missing.name != "triton":
            raise
        return None
    except Exception as failure:  # a compiler of another release may raise whatever it likes
        reason = f"{type(failure).__name__}: {failure}"
    else:
        if all(error <= TOLERANCES[dtype] for error in errors):
            return attention
        reason = f"whose numbers are off by {', '.join(f'{error:.2g}' for error in errors)}"
    logger.warning("towers attend to one image or window after the other: without our Triton kernel, %s", reason)
    return None


@torch.inference_mode()
def packed_trial(
    attention: TritonPackedAttention, num: int, dim: int, device: torch.device, dtype: torch.dtype
) -> float:
    """How far off plain torch in float64 it is at worst, of a value or of 1 where that is more; maybe NaN."""
    starts = list(accumulate(SEQUENCES, initial=0))
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(starts[-1], 3, num, dim, generator=generator).to(dtype).to(device)
    query, key, value = packed.unbind(1)
    found = attention(query, key, value, torch.tensor(starts, dtype=torch.int32, device=device), dim**-0.5)
    expected = torch.cat([_plain(*packed[first:end].double().unbind(1)) for first, end in pairwise(starts)])
    return float(((found.double() - expected).abs() / expected.abs().clamp_min(1.0)).amax())  # which keeps a NaN


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
