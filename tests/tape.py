"""A CUDA graph for CPUs: operators are recorded with their tensors, and replayed on those alone.

Like the real one it runs no Python when it is replayed, so that numbers which Python took from a step stay those of the
recording; and it refuses what the real one refuses: a look at values, and constants that come from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LOOKS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"}
_CONSTANTS = {"lift_fresh"}


class Tape(TorchDispatchMode):
    """Notes every operator called inside, and raises RuntimeError for those that make the host wait for the device."""

    def __init__(self, refused: Set[str] = _LOOKS) -> None:
        """``refused``: names of operators."""
        super().__init__()
        self.refused = refused
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name in self.refused or (name.startswith("index") and _has_mask(args)):
            raise RuntimeError(f"{name} looks at values, or takes them from the host")
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        memories = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        is_view = any(tensor.untyped_storage().data_ptr() in memories for tensor in outputs)
        if func._schema.is_mutable or not is_view:
            self.calls.append((func, args, kwargs, outputs))
        return result


def record(compute: Callable[[], Any]) -> Callable[[], None]:
    """Run ``compute`` twice, the second time on tape; what is returned replays it."""
    compute()
    with Tape(_LOOKS | _CONSTANTS) as tape:
        compute()

    def replay() -> None:
        for func, args, kwargs, outputs in tape.calls:
            results = _tensors(func(*args, **kwargs))
            for old, new in zip(outputs, results, strict=True):
                if old.data_ptr() != new.data_ptr():  # else the call wrote to its arguments
                    old.copy_(new)

    return replay


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _has_mask(args: Any) -> bool:
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1:2]))
