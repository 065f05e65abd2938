"""Qwen2 and Qwen2.5: query, key and value carry a bias, the output does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.engine.models.decoder import DecoderConfig

if TYPE_CHECKING:
    from transformers import Qwen2Config


def qwen2(config: Qwen2Config) -> DecoderConfig:
    """The decoder of a ``Qwen2ForCausalLM``."""
    return DecoderConfig.of(config, qkv_bias=True)
