"""Qwen3-VL: Qwen3 text; a head's frequencies are interleaved over the three positions (arXiv 2511.21631)."""

from __future__ import annotations

from typing import Any

from nanovllm.engine.models.decoder import DecoderConfig
from nanovllm.engine.models.qwen_vl import sections


def qwen3_vl(config: Any) -> DecoderConfig:
    """The decoder of a ``Qwen3VLForConditionalGeneration``."""
    shares = sections(config)
    axes = tuple(
        pair % 3 if pair % 3 and pair < 3 * shares[pair % 3] else 0  # what is left over turns with time
        for pair in range(sum(shares))
    )
    bias = config.attention_bias
    return DecoderConfig.of(config, qk_norm=True, qkv_bias=bias, output_bias=bias, position_axes=axes)
