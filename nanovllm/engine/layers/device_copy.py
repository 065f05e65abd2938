"""Copies of small tensors to a device and back, without needless synchronisation.

A copy from pageable memory makes the host wait for everything that the GPU has yet to do. From pinned memory it is one
more entry of the queue, and torch keeps the memory until the copy is done. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(
    values: Sequence[int] | Sequence[float], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """``values`` as a tensor [n] on ``device``, int64 or float32 unless ``dtype`` says otherwise; does not wait."""
    return move(torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda"), device)


def move(host: Tensor, device: torch.device) -> Tensor:
    """A tensor in the host's memory to ``device``, pinned on its way if it is not yet."""
    if device.type == "cuda" and not host.is_pinned():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def together(lists: Sequence[Sequence[int] | np.ndarray], device: torch.device) -> tuple[Tensor, ...]:
    """Lists and flat arrays of integers as int64 tensors [n] on ``device``, all of them in one copy."""
    lengths = [len(values) for values in lists]
    host = torch.empty(sum(lengths), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate([np.asarray(values, np.int64) for values in lists], out=host.numpy())
    return move(host, device).split(lengths)


def read_back(tokens: Tensor) -> list[int]:
    """The values of ``tokens`` [n]: waits until the device has computed them, once a step."""
    if tokens.is_cuda:
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(tokens.device))
        done.synchronize()
        tokens = host
    return tokens.tolist()
