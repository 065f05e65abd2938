"""GGUF checkpoints, written by the format's own library as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from checkpoints import make_tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def write_gguf(
    file: Path, checkpoint: Path, *, tensors_a_part: int = 0, metadata: dict[str, Any] | None = None, **extra: Any
) -> Path:
    """A text checkpoint in float32; the first part where ``tensors_a_part`` splits it.

    Rotary scaling is written where llama.cpp has it: linear and YaRN in the metadata, Llama 3's as a tensor of factors.
    ``extra`` are tensors by name, None leaves one out; ``metadata`` are token ids and flags of the tokenizer.
    """
    config: Any = AutoConfig.from_pretrained(checkpoint)
    architecture = config.model_type
    writer = gguf.GGUFWriter(file, architecture, split_max_tensors=tensors_a_part)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tensors = _tensors(checkpoint, config) | _rotary(writer, config, head_dim)
    _add_tokenizer(writer, metadata or {})
    for name, tensor in {**tensors, **extra}.items():
        if tensor is not None:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file if not tensors_a_part else sorted(file.parent.glob(f"{file.stem}-00001-of-*.gguf"))[0]


def _tensors(checkpoint: Path, config: Any) -> dict[str, Any]:
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        array = tensor.float().numpy()
        if config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            pairs = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)  # llama.cpp rotates neighbours
        suffix = "." + name.rsplit(".", 1)[1]
        tensors[f"{names.get_name(name.removesuffix(suffix))}{suffix}"] = array
    return tensors


def _rotary(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> dict[str, Any]:
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2) / head_dim)
        return {"rope_freqs.weight": (plain / scaled).float().numpy()}
    if rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    return {}


def _add_tokenizer(writer: gguf.GGUFWriter, metadata: dict[str, Any]) -> None:
    tokenizer = make_tokenizer()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    plain, control, user_defined = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    kinds = {index: control if token.special else user_defined for index, token in added.items()}
    writer.add_token_types([kinds.get(index, plain) for index in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    usual = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.pad_token_id, "add_bos_token": False}
    for name, value in {**usual, **metadata}.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(f"tokenizer.ggml.{name}", value)
    writer.add_chat_template(tokenizer.chat_template)
