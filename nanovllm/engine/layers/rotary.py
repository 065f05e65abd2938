"""Rotary position embeddings (RoPE): the angle of each pair of a head's dimensions at each position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanovllm.errors import UnsupportedModel

# "dynamic" equals "default" up to max_position_embeddings, where contexts with it end.
_SCALED = ("linear", "dynamic", "llama3", "yarn")


def known_positions(config: Any) -> int:
    """Positions at which a transformers ``config`` was trained or is scaled to be used.

    These are its max_position_embeddings; with YaRN the original ones times the factor where that is more, and with
    linear scaling its own times the factor: model cards (Qwen2.5, Qwen3, Vicuna 16k) add the scaling and leave
    max_position_embeddings as it was.
    """
    rope, own = config.rope_parameters or {}, int(config.max_position_embeddings)
    kind, factor = rope.get("rope_type"), float(rope.get("factor") or 1.0)
    if kind == "linear":
        return max(own, int(own * factor))
    if kind == "yarn":
        return max(own, int((rope.get("original_max_position_embeddings") or own) * factor))
    return own


def rotary_table(config: Any, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosine and signed sine of every position of a transformers ``config``: [known_positions, 2, head_dim].

    The sine of the first half comes negative, as ``token_ops.rotate_heads`` wants it. Raises UnsupportedModel for a
    ``rope_type`` that is not implemented.
    """
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        frequencies, scale = 1.0 / float(rope.get("rope_theta", 10_000.0)) ** exponents, 1.0
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, device)
    steps = torch.arange(known_positions(config), dtype=torch.float32, device=device)
    angles = torch.outer(steps, frequencies)
    cos, sin = angles.cos() * float(scale), angles.sin() * float(scale)
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1).to(dtype)


def check_rope(config: Any) -> None:
    """Raise UnsupportedModel for rotary positions that ``rotary_table`` cannot make."""
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", *_SCALED):
        raise UnsupportedModel(f"rope_type {kind!r} is not supported; default, {', '.join(_SCALED)} are")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported, only 1.0 is")
