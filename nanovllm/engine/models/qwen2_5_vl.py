"""Qwen2.5-VL: Qwen2 text; a head's frequencies are cut into three runs, one for each position (arXiv 2409.12191)."""

from __future__ import annotations

from typing import Any

from nanovllm.engine.models.decoder import DecoderConfig
from nanovllm.engine.models.qwen_vl import sections


def qwen2_5_vl(config: Any) -> DecoderConfig:
    """The decoder of a ``Qwen2_5_VLForConditionalGeneration``."""
    axes = tuple(axis for axis, length in enumerate(sections(config)) for _ in range(length))
    return DecoderConfig.of(config, qkv_bias=True, position_axes=axes)
