"""Qwen3: queries and keys are normalised head by head before rotation."""

from __future__ import annotations

from transformers import Qwen3Config

from nanovllm.engine.models.decoder import DecoderConfig


def qwen3(config: Qwen3Config) -> DecoderConfig:
    """The decoder of a ``Qwen3ForCausalLM``."""
    bias = config.attention_bias
    return DecoderConfig.of(config, qk_norm=True, qkv_bias=bias, output_bias=bias)
