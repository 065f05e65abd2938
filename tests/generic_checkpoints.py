"""Small random checkpoints of families that this engine has no code for, saved by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.checkpoints import make_tokenizer, randomise

_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}

TEXT_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None, "num_local_experts": 4},  # experts
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},  # scaled logits
    "cohere": {"logit_scale": 0.25},  # scaled logits
    "phi3": {"sliding_window": None},  # one matrix for queries, keys and values
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 2048},  # learnt positions
    "olmo2": {},
    "glm4": {"head_dim": 16},
    "deepseek_v3": {  # keys wider than values
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1,
        "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
        "num_key_value_heads": 4, "first_k_dense_replace": 1,
    },
}  # fmt: skip

STATEFUL_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1],
                            "partial_rotary_factor": 0.5},
        **_LINEAR_ATTENTION,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "block_multiple_of": 16,
             "conv_L_cache": 3},
}  # fmt: skip


def make_generic_text(directory: Path, family: str, *, seed: int = 0, **config: Any) -> Path:
    """A text checkpoint of a ``family`` of transformers, by its ``model_type``, with a tokenizer."""
    tokenizer = make_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    own = {**TEXT_FAMILIES, **STATEFUL_FAMILIES}.get(family, {})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shape, **own, **config})).eval()
    randomise(model, seed)
    model.tie_weights()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
