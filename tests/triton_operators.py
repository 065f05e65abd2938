"""Launches of our Triton kernels as operators of torch, so that ``tape.record`` can note and replay them.

The interpreter looks at values, which a kernel does on the device: for whoever records, a launch is one operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.engine.attention import triton_paged
from nanovllm.engine.kernels import norm_triton, rotary_triton, silu_triton
from nanovllm.engine.kernels.paged_triton import Tile, paged_attention


def _operator(launch: Callable[..., Tensor], arguments: str, mutated: tuple[str, ...] = ()) -> Callable[..., Tensor]:
    """``launch`` with ``arguments`` in the language of torch's schemas."""
    name = f"nanovllm_tests::{launch.__name__}"
    return torch.library.custom_op(name, launch, mutates_args=mutated, schema=f"({arguments}) -> Tensor")


def _with_numbers(
    query: Tensor, cache: Tensor, starts: Tensor, contexts: Tensor, tables: Tensor, tile: list[int], splits: int
) -> Tensor:
    return paged_attention(query, cache, starts, contexts, tables, Tile(*tile), splits)


_attention_by_numbers = _operator(
    _with_numbers,
    "Tensor query, Tensor cache, Tensor starts, Tensor contexts, Tensor tables, int[] tile, int splits",
)


def _attention(
    query: Tensor, cache: Tensor, starts: Tensor, contexts: Tensor, tables: Tensor, tile: Tile, splits: int
) -> Tensor:
    return _attention_by_numbers(query, cache, starts, contexts, tables, list(astuple(tile)), splits)


_LAUNCHES: dict[tuple[Any, str], Callable[..., Tensor]] = {
    (triton_paged, "paged_attention"): _attention,
    (norm_triton, "add_rms_norm"): _operator(
        norm_triton.add_rms_norm,
        "Tensor(a!) residual, Tensor? update, Tensor weight, float eps",
        ("residual",),
    ),
    (rotary_triton, "rotate_and_write"): _operator(
        rotary_triton.rotate_and_write,
        "Tensor qkv, Tensor? norm, float eps, Tensor cos, Tensor signed_sin, Tensor(a!) keys, Tensor(b!) values, "
        "Tensor slots",
        ("keys", "values"),
    ),
    (silu_triton, "gated_silu"): _operator(silu_triton.gated_silu, "Tensor gate_up"),
}


def launch_by_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every launch an operator until the test ends."""
    for (module, name), operator in _LAUNCHES.items():
        monkeypatch.setattr(module, name, operator)
