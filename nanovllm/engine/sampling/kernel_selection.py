"""Which kernels sample on a device: ours in Triton on CUDA if they draw what torch's operators draw, else the latter.

On a CPU `random_draw` and `structured_output` choose between our C++ kernels and torch's operators themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.engine.layers.device_copy import move
from nanovllm.engine.sampling import random_draw, structured_output
from nanovllm.engine.sampling.sampling_batch import RandomRows
from nanovllm.engine.sampling.structured_output import GuidedRows

logger = logging.getLogger(__name__)

_ROWS = 20  # of the trial: more than a small batch has, whose launches differ
_MAX_DIFFERENT = 1  # of its draws: rounding decides about one in 100,000


@dataclass(frozen=True)
class SamplingKernels:
    """How tokens are drawn and masks applied; ``reason``: why not by Triton's kernels, None if by these."""

    draw_tokens: Callable[[Tensor, RandomRows], Tensor] = random_draw.draw_tokens
    forbid_masked: Callable[[Tensor, GuidedRows], None] = structured_output.forbid_masked
    reason: str | None = "they are for CUDA"


def choose_kernels(device: torch.device, dtype: torch.dtype, vocab_size: int) -> SamplingKernels:
    """The kernels for logits [rows, vocab_size] of ``dtype`` on ``device``; they are compiled and tried at once."""
    if device.type != "cuda":
        return SamplingKernels()
    try:
        kernels = triton_kernels()
        different = trial(kernels, device, dtype, vocab_size)
    except Exception as failure:  # a compiler may raise whatever it likes
        reason = f"{type(failure).__name__}: {failure}"
    else:
        if different <= _MAX_DIFFERENT:
            return kernels
        reason = f"{different} of {3 * _ROWS} draws in the trial differ from torch's"
    logger.warning("sampling sorts the vocabulary, because Triton's kernels cannot be used: %s", reason)
    return SamplingKernels(reason=reason)


def triton_kernels() -> SamplingKernels:
    """Ours in Triton; ModuleNotFoundError where it is not installed."""
    from nanovllm.engine.kernels import sampling_triton

    def draw_tokens(logits: Tensor, random: RandomRows) -> Tensor:
        return sampling_triton.draw_tokens(
            logits, random.rows, random.limits, random.keys, is_limited=random.has_min_p, is_searched=random.has_top
        )

    def forbid_masked(logits: Tensor, guided: GuidedRows) -> None:
        sampling_triton.forbid_masked(logits, guided.rows, guided.masks)

    return SamplingKernels(draw_tokens, forbid_masked, None)


@torch.inference_mode()
def trial(kernels: SamplingKernels, device: torch.device, dtype: torch.dtype, vocab_size: int) -> int:
    """How many draws of ``kernels`` differ from those of torch's operators; all of them if masks do.

    There are rows without limits, with ``min_p``, and with all limits, in few rows and in many; their logits are flat
    enough for every limit to change draws.
    """
    generator = torch.Generator().manual_seed(0)
    logits = (0.5 * torch.randn(_ROWS, vocab_size, generator=generator)).to(dtype)
    words = -(-vocab_size // 32)
    masks = torch.randint(-(2**31), 2**31, (_ROWS // 2, words), generator=generator).int()
    masks[:, 0] |= 1
    guided = GuidedRows(torch.arange(0, _ROWS, 2), masks).to(device)
    logits, expected = move(logits, device), move(logits, device).clone()
    kernels.forbid_masked(logits, guided)
    structured_output.forbid_by_torch(expected, guided)
    if not torch.equal(logits, expected):
        return 3 * _ROWS
    different = 0
    keys = torch.randint(2**63 - 1, (_ROWS, 3), generator=generator)
    for has_min_p, has_top in ((False, False), (True, False), (True, True)):
        limits = torch.tensor([[1.0 / (0.5 + row % 3), 0.0, 2.0] for row in range(_ROWS)])
        if has_min_p:
            limits[1::2, 1] = 0.2
        keys[:, 2] = vocab_size
        if has_top:
            limits[1::3, 2] = 0.6
            limits[2::3, 2] = 0.3
            keys[0::2, 2] = torch.tensor([1, 2, 5, 10, 20, 50, 100, 500, 2000, 10_000]).clamp(max=vocab_size)
        for rows in (slice(4), slice(4, _ROWS)):
            chosen = torch.arange(_ROWS)[rows]
            random = RandomRows(chosen.to(device), limits[rows].to(device), keys[rows].to(device), has_min_p, has_top)
            wanted = random_draw.draw_by_torch(expected[rows], random.limits, random.keys)
            different += int((kernels.draw_tokens(logits, random) != wanted).sum())
    return different
