"""Qwen2 and Qwen2.5: query, key and value carry a bias, the output does not."""

from __future__ import annotations

from transformers import Qwen2Config

from nanovllm.engine.models.decoder import DecoderConfig


def qwen2(config: Qwen2Config) -> DecoderConfig:
    """The decoder of a ``Qwen2ForCausalLM``."""
    return DecoderConfig.of(config, qkv_bias=True)
