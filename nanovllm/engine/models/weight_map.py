"""A decoder's tensors: their names in a checkpoint, and the slices of this engine's fused parameters that they fill."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.checkpoints.tensors import load_parameters
from nanovllm.engine.layers.linear import Linear
from nanovllm.engine.models.decoder import Decoder, DecoderConfig, DecoderLayer


def parameter_places(model: Decoder, *, tied: bool) -> dict[str, list[Tensor]]:
    """Where each tensor of a ``…ForCausalLM`` checkpoint goes: views of this model's parameters."""
    config = model.config
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    targets: dict[str, list[Tensor]] = {
        "model.embed_tokens.weight": [model.embed_tokens.data],
        "model.norm.weight": [model.norm.weight.data],
    }
    if not tied:
        targets["lm_head.weight"] = [model.lm_head.weight.data]
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        prefix = f"model.layers.{index}."
        attention, mlp = layer.self_attn, layer.mlp
        targets |= _split(attention.qkv_proj, f"{prefix}self_attn.", {"q_proj": query, "k_proj": key, "v_proj": key})
        targets |= _split(attention.o_proj, f"{prefix}self_attn.", {"o_proj": config.hidden_size})
        half = config.intermediate_size
        targets |= _split(mlp.gate_up_proj, f"{prefix}mlp.", {"gate_proj": half, "up_proj": half})
        targets |= _split(mlp.down_proj, f"{prefix}mlp.", {"down_proj": config.hidden_size})
        if attention.qk_norm is not None:
            heads = attention.qk_norm.data.split((config.num_attention_heads, config.num_key_value_heads))
            targets[f"{prefix}self_attn.q_norm.weight"] = list(heads[0])
            targets[f"{prefix}self_attn.k_norm.weight"] = list(heads[1])
        targets[f"{prefix}input_layernorm.weight"] = [layer.input_layernorm.weight.data]
        targets[f"{prefix}post_attention_layernorm.weight"] = [layer.post_attention_layernorm.weight.data]
    return targets


def _split(linear: Linear, prefix: str, rows: dict[str, int]) -> dict[str, list[Tensor]]:
    """The parts of a fused layer, weight and bias, by their names in a checkpoint; ``rows`` are outputs of each."""
    targets: dict[str, list[Tensor]] = {}
    for kind, parameter in (("weight", linear.weight), ("bias", linear.bias)):
        if parameter is not None:
            parts = parameter.data.split(list(rows.values()))
            targets |= {f"{prefix}{name}.{kind}": [part] for name, part in zip(rows, parts, strict=True)}
    return targets


def load_decoder(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    *,
    tied: bool,
    prefixes: Sequence[tuple[str, str | None]],
    dtype: torch.dtype,
    device: torch.device,
) -> Decoder:
    """The text model of a checkpoint.

    ``prefixes`` are those of stored names, each with its replacement in a ``…ForCausalLM``; the first that fits counts.
    None, or no prefix that fits, marks a tensor of the vision model.
    """

    def rename(stored: str) -> str | None:
        for prefix, replacement in prefixes:
            if stored.startswith(prefix):
                return None if replacement is None else replacement + stored.removeprefix(prefix)
        return None

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Decoder(config)
    finally:
        torch.set_default_dtype(default)
    tied = tied or all(rename(name) != "lm_head.weight" for name in checkpoint.names)
    if tied:
        model.lm_head.weight = model.embed_tokens

    def wanted(stored: str) -> str | None:
        name = rename(stored)
        # Old releases of transformers stored the rotary frequencies too; they follow from the configuration.
        computed = name is not None and name.endswith("rotary_emb.inv_freq")
        return None if computed or (tied and name == "lm_head.weight") else name

    load_parameters(checkpoint.files, parameter_places(model, tied=tied), wanted)
    return model.eval()
