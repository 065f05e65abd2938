"""A decoder's tensors: their names in a checkpoint, and the slices of this engine's fused parameters that they fill."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.checkpoints.resolve import checkpoint_name
from nanovllm.checkpoints.tensors import load_parameters
from nanovllm.engine.layers.linear import Linear
from nanovllm.engine.models.decoder import Decoder, DecoderConfig, DecoderLayer
from nanovllm.errors import UnsupportedModel

logger = logging.getLogger(__name__)

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


def parameter_places(model: Decoder) -> dict[str, list[Tensor]]:
    """Where each tensor of a ``…ForCausalLM`` checkpoint goes: views of this model's parameters."""
    config = model.config
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    targets: dict[str, list[Tensor]] = {
        _EMBEDDING: [model.embed_tokens.data],
        _HEAD: [model.lm_head.weight.data],
        "model.norm.weight": [model.norm.weight.data],
    }
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
    """The text model of a checkpoint: every parameter of it is a stored tensor.

    ``tied`` is the configuration's word on head and embedding, and means what it means in transformers: where one of
    them is stored, it serves as both; where both are, with different values, each is used.
    ``prefixes`` are those of stored names, each with its replacement in a ``…ForCausalLM``; the first that fits counts.
    None marks a tensor of the vision model.

    Raises UnsupportedModel for tensors that are missing, unknown, or not what the configuration says; names them.
    """

    def rename(stored: str) -> str | None:
        for prefix, replacement in prefixes:
            if stored.startswith(prefix):
                return None if replacement is None else replacement + stored.removeprefix(prefix)
        return stored

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Decoder(config)
    except (RuntimeError, MemoryError) as error:  # torch's words for a size that cannot be, or not here
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnsupportedModel(
            f"the model of config.json of {checkpoint_name(checkpoint.directory)!r} cannot be made on {device}: {why}"
        ) from error
    finally:
        torch.set_default_dtype(default)
    places = parameter_places(model)
    stored = {rename(name) for name in checkpoint.names}
    is_shared = tied and not {_HEAD, _EMBEDDING} <= stored
    if is_shared:
        model.lm_head.weight = model.embed_tokens
        del places[_HEAD]
        places[_HEAD if _HEAD in stored else _EMBEDDING] = places.pop(_EMBEDDING)
    load_parameters(checkpoint.files, places, rename)
    if tied and not is_shared:
        if torch.equal(model.lm_head.weight, model.embed_tokens):
            model.lm_head.weight = model.embed_tokens
        else:
            logger.warning(
                "config.json of %r ties the output head to the embedding, and the checkpoint stores both with "
                "different values: both are used. Its tie_word_embeddings should be false",
                checkpoint_name(checkpoint.directory),
            )
    return model.eval()
