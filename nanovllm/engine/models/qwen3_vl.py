"""Qwen3-VL: Qwen3 text; a head's frequencies are dealt out to the three positions in turn (arXiv 2511.21631)."""

from __future__ import annotations

from typing import Any

from nanovllm.engine.models.decoder import DecoderConfig
from nanovllm.engine.models.qwen_vl import sections


def qwen3_vl(config: Any) -> DecoderConfig:
    """The decoder of a ``Qwen3VLForConditionalGeneration``."""
    shares = sections(config)
    axes = tuple(
        turn % 3 if turn % 3 and turn < 3 * shares[turn % 3] else 0  # what is left over turns with time
        for turn in range(sum(shares))
    )
    bias = config.attention_bias
    return DecoderConfig.of(config, qk_norm=True, qkv_bias=bias, output_bias=bias, position_axes=axes)
