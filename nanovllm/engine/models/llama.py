"""Llama 1 to 3 and what is built like them (SmolLM2, Vicuna): no norms of queries and keys, biases where asked for."""

from __future__ import annotations

from transformers import LlamaConfig

from nanovllm.engine.models.decoder import DecoderConfig


def llama(config: LlamaConfig) -> DecoderConfig:
    """The decoder of a ``LlamaForCausalLM``."""
    bias = config.attention_bias
    return DecoderConfig.of(config, qkv_bias=bias, output_bias=bias, mlp_bias=config.mlp_bias)
