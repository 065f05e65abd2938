"""transformers' attention interface over paged keys and values, and the probe that learns what a model's layers want.

Both travel to the layers as a keyword argument of the decoder's forward pass, `STEP`; without it (towers share the
implementation's name in some families) attention is torch's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nanovllm.engine.attention.base import AttentionBackend
from nanovllm.engine.models.generic_states import RowStates

IMPLEMENTATION = "nanovllm"
"""Name of the attention in transformers. It has no mask interface, so that models make no masks for it."""
STEP = "nanovllm_step"
RECORDED = "nanovllm_recorded"
"""Name of torch's attention with a look at the masks, which a forward pass takes as `MASKS`."""
MASKS = "nanovllm_masks"


@dataclass(frozen=True)
class AttentionLayer:
    """What a layer asks of attention.

    ``lacking`` names what the engine's attention does not have. ``window`` is in tokens; None: all are seen.
    """

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scaling: float
    window: int | None
    lacking: tuple[str, ...]

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Heads of keys and values, and the width of the wider."""
        return self.num_kv_heads, max(self.key_dim, self.value_dim)


class AttendsForLayer(Protocol):
    """What computes attention for a layer of transformers."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, options: Mapping[str, Any]
    ) -> Tensor:
        """[1, heads, T, d] each → [1, T, heads, d]."""


@dataclass(frozen=True)
class PagedStep:
    """One step of the engine: all its tokens are one row of T."""

    attention: AttentionBackend
    caches: Mapping[int, Tensor]  # by the layer's index
    metadata: Any
    states: Sequence[RowStates] = ()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, options: Mapping[str, Any]
    ) -> Tensor:
        """See AttendsForLayer. The narrower of keys and values is padded; zeros change no product."""
        values = value.shape[-1]
        width = max(query.shape[-1], values)
        factor = scaling * math.sqrt(width)  # the backends scale by the root of the width
        if not math.isclose(factor, 1.0):
            query = query * factor
        query, key, value = (_by_token(_padded(part, width)) for part in (query, key, value))
        output = self.attention.attend(query, key, value, self.caches[_index(module)], self.metadata)
        return output[..., :values].unsqueeze(0)


@dataclass
class AttentionProbe:
    """Records the attention of a forward pass, layer by layer, and computes it by torch."""

    layers: dict[int, AttentionLayer] = field(default_factory=dict)
    states: Sequence[RowStates] = ()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, options: Mapping[str, Any]
    ) -> Tensor:
        """See AttendsForLayer."""
        lacking = []
        index = _index(module)
        if index in self.layers:
            lacking.append("a second attention in one layer")
        if options.get("softcap") is not None:
            lacking.append(f"a soft cap of {options['softcap']}")
        if options.get("s_aux") is not None or getattr(module, "sinks", None) is not None:
            lacking.append("attention sinks")
        if options.get("position_bias") is not None:
            lacking.append("a position bias")
        if options.get("attention_mask") is not None:
            lacking.append("a mask of its own")
        if getattr(module, "is_cross_attention", False) or key.shape[2] != query.shape[2]:
            lacking.append("cross-attention")
        if getattr(module, "is_causal", True) is False or options.get("is_causal") is False:
            lacking.append("attention to later tokens")
        window = options.get("sliding_window")
        self.layers[index] = AttentionLayer(
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            key_dim=key.shape[-1],
            value_dim=value.shape[-1],
            scaling=scaling,
            window=None if window is None else int(window),
            lacking=tuple(lacking),
        )
        output: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, None, scaling=scaling, is_causal=True
        )[0]
        return output


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    nanovllm_step: AttendsForLayer | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [1, heads, T, d] in, [1, T, heads, d] out, no weights."""
    if nanovllm_step is None:
        output: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, **options
        )[0]
        return output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    options["attention_mask"] = attention_mask
    return nanovllm_step.attend(module, query, key, value, scale, options), None


@dataclass
class MaskRecord:
    """What the masks of a forward pass of transformers do, by layer, beyond hiding later tokens."""

    features: dict[int, str] = field(default_factory=dict)

    def see(self, module: nn.Module, mask: Tensor, options: Mapping[str, Any]) -> None:
        """Look at a layer's ``mask`` [batch, heads, queries, keys], boolean or to be added."""
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        is_earlier = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
        if (seen & ~is_earlier).any():
            self.features[_index(module)] = "attention to later tokens, such as those of an image,"
        elif (is_earlier & ~seen).any() and options.get("sliding_window") is None:
            self.features[_index(module)] = "a mask that hides earlier tokens"


def _attend_recorded(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    nanovllm_masks: MaskRecord | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """torch's attention as transformers calls it; the mask is recorded."""
    if nanovllm_masks is not None and attention_mask is not None:
        nanovllm_masks.see(module, attention_mask, options)
    output: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, **options
    )
    return output


def _index(module: nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise TypeError(f"{type(module).__name__} has no layer_idx")
    return index


def _by_token(part: Tensor) -> Tensor:
    """[1, heads, T, d] → [T, heads, d] without gaps: a stride over a single head says whatever it likes."""
    _, heads, tokens, width = part.shape
    return part[0].transpose(0, 1).reshape(tokens, heads * width).view(tokens, heads, width)


def _padded(part: Tensor, width: int) -> Tensor:
    missing = width - part.shape[-1]
    return F.pad(part, (0, missing)) if missing else part


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)
ALL_ATTENTION_FUNCTIONS.register(RECORDED, _attend_recorded)
AttentionMaskInterface.register(RECORDED, sdpa_mask)
