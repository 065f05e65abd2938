"""Copies of small tensors to a device and back, without needless synchronisation.

A copy from pageable memory makes the host wait for everything that the GPU has yet to do. From pinned memory it is one
more entry of the queue, and torch keeps the memory until the copy is done. On a CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def is_asynchronous(device: torch.device) -> bool:
    """Whether an operator returns before ``device`` has computed it."""
    return device.type == "cuda"


class HostCopy:
    """Copies of tensors of one device to the host's memory, queued when this is made.

    What is queued later does not delay them, as it would a copy that is begun when it is read.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._done: torch.cuda.Event | None = None
        self._tensors = list(tensors)
        if self._tensors and self._tensors[0].is_cuda:
            stream = torch.cuda.current_stream(self._tensors[0].device)
            self._tensors = [_queue_copy(tensor) for tensor in self._tensors]
            self._done = torch.cuda.Event()
            self._done.record(stream)

    def wait(self) -> list[Tensor]:
        """The tensors in the host's memory, once the device has computed them."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors


def _queue_copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
