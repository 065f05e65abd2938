"""Llama 1 to 3 and what is built like them (SmolLM2, Vicuna): no norms of queries and keys, biases where asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanovllm.engine.models.decoder import DecoderConfig

if TYPE_CHECKING:
    from transformers import LlamaConfig


def llama(config: LlamaConfig) -> DecoderConfig:
    """The decoder of a ``LlamaForCausalLM``."""
    bias = config.attention_bias
    return DecoderConfig.of(config, qkv_bias=bias, output_bias=bias, mlp_bias=config.mlp_bias)
