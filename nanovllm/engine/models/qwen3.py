"""Qwen3: queries and keys are normalised head by head before rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.engine.models.decoder import DecoderConfig

if TYPE_CHECKING:
    from transformers import Qwen3Config


def qwen3(config: Qwen3Config) -> DecoderConfig:
    """The decoder of a ``Qwen3ForCausalLM``."""
    bias = config.attention_bias
    return DecoderConfig.of(config, qk_norm=True, qkv_bias=bias, output_bias=bias)
