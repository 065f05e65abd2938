"""Attention of towers over packed sequences: one call a layer for all images and windows, by a kernel handed in.

Towers of transformers that keep an image's size put a batch's images one behind the other. To most implementations of
attention they pass one sequence a call, after the host has read the lengths from the device, in every layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMPLEMENTATION = "nanovllm_flash_packed"
"""Name of the attention in transformers, whose towers pass all sequences at once where a name has "flash" in it."""


class PackedAttention(Protocol):
    """Attention over sequences that lie one behind the other."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> Tensor:
        """[T, heads, d] each → the same; sequence r has the tokens from starts[r] (int32) to starts[r + 1]."""


def packed_heads(tower: nn.Module) -> set[tuple[int, int]]:
    """Heads and their size, of the layers that :func:`attend_packed` would serve; empty where it cannot."""
    layers = list(_attention_layers(tower))
    if not all("cu_seqlens" in inspect.signature(layer.forward).parameters for layer in layers):
        return set()
    heads = {(getattr(layer, "num_heads", None), getattr(layer, "head_dim", None)) for layer in layers}
    return {(num, dim) for num, dim in heads if num and dim}


def attend_packed(tower: nn.Module, attention: PackedAttention) -> None:
    """Have ``attention`` compute the layers of a tower that has :func:`packed_heads`."""
    for layer in _attention_layers(tower):
        layer.packed_attention = attention
        layer.config._attn_implementation = IMPLEMENTATION


def is_packed(tower: Any) -> bool:
    """Whether a tower with a configuration has been given an attention."""
    return bool(tower.config._attn_implementation == IMPLEMENTATION)


def _attention_layers(tower: nn.Module) -> Iterator[Any]:
    return (module for module in tower.modules() if hasattr(module, "is_causal") and hasattr(module, "config"))


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [1, heads, T, d] in, [1, T, heads, d] out, no weights."""
    by_token = (part[0].transpose(0, 1) for part in (query, key, value))
    return module.packed_attention(*by_token, cu_seq_lens_q, scaling).unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)
