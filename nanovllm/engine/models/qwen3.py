"""Qwen3: grouped-query attention with normalised queries and keys, rotary positions, gated SiLU feed-forward.

Tokens of all sequences of a step stand in one row [T]; which of them see one another is the attention backend's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config

from nanovllm.engine.attention import AttentionBackend
from nanovllm.engine.linear import Linear, Quantization
from nanovllm.engine.loader import Checkpoint, load_parameters
from nanovllm.errors import UnsupportedModel


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class RMSNorm(nn.Module):
    """Scale a vector to unit root mean square, then by a learnt weight."""

    def __init__(self, size: int, eps: float) -> None:
        """Uninitialised."""
        super().__init__()
        self.weight = _weight(size)
        self._shape = (size,)
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] → [..., size]."""
        return F.rms_norm(x, self._shape, self.weight, self._eps)


class Attention(nn.Module):
    """Self-attention. Query, key and value weights are one matrix, and queries and keys are treated in one go."""

    def __init__(self, config: Qwen3Config) -> None:
        """Uninitialised."""
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.num_rotary = self.num_heads + self.num_kv_heads
        total = (self.num_rotary + self.num_kv_heads) * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, total, bias=config.attention_bias)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.attention_bias)
        self.qk_norm = _weight(self.num_rotary, self.head_dim)  # q_norm for each query head, k_norm for each key head
        self._eps = config.rms_norm_eps

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], cache: Tensor, attention: AttentionBackend, plan: Any
    ) -> Tensor:
        """[T, hidden] → [T, hidden]; ``rotary``: cosine and signed sine [T, 1, d]."""
        qkv = self.qkv_proj(hidden).view(-1, self.num_rotary + self.num_kv_heads, self.head_dim)
        qk = F.rms_norm(qkv[:, : self.num_rotary], (self.head_dim,), None, self._eps) * self.qk_norm
        qk = rotate(qk, rotary)
        query, key = qk.split((self.num_heads, self.num_kv_heads), 1)
        output = attention.attend(query, key, qkv[:, self.num_rotary :], cache, plan)
        return self.o_proj(output.reshape(len(hidden), -1))


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on [T, heads, d]: halves (a, b) become (a cos - b sin, b cos + a sin)."""
    cos, signed_sin = rotary
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)


class MLP(nn.Module):
    """down(silu(gate x) * up x), gate and up as one matrix."""

    def __init__(self, config: Qwen3Config) -> None:
        """Uninitialised."""
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, hidden] → [T, hidden]."""
        gate, up = self.gate_up_proj(hidden).chunk(2, -1)
        return self.down_proj(F.silu(gate).mul_(up))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream and added back to it."""

    def __init__(self, config: Qwen3Config) -> None:
        """Uninitialised."""
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], cache: Tensor, attention: AttentionBackend, plan: Any
    ) -> Tensor:
        """[T, hidden] → [T, hidden]."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, cache, attention, plan)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Qwen3(nn.Module):
    """The text model: embedding, layers, norm, and the output head for the rows that sample."""

    def __init__(self, config: Qwen3Config) -> None:
        """Uninitialised parameters. Raises UnsupportedModel for options of the family that are not implemented."""
        super().__init__()
        rope = dict(config.rope_parameters or {})
        if rope.get("rope_type", "default") != "default":
            raise UnsupportedModel(f"rope_type {rope['rope_type']!r} is not supported, only 'default' is")
        if any(kind != "full_attention" for kind in config.layer_types or ()):
            raise UnsupportedModel("sliding-window attention is not supported")
        if config.hidden_act != "silu":
            raise UnsupportedModel(f"hidden_act {config.hidden_act!r} is not supported, only 'silu' is")
        self.config = config
        self.embed_tokens = _weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self._rope_theta = float(rope.get("rope_theta", 10_000.0))
        self._rotary: Tensor | None = None

    def positions(self, start: int, end: int) -> Sequence[int]:
        """The positions of a sequence's tokens [start, end): plain numbers in this family, images included."""
        return range(start, end)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] → [T, hidden]."""
        return F.embedding(token_ids, self.embed_tokens)

    def forward(
        self, hidden: Tensor, positions: Tensor, caches: Sequence[Tensor], attention: AttentionBackend, plan: Any
    ) -> Tensor:
        """Embeddings [T, hidden] at ``positions`` [T] → normalised hidden states [T, hidden]."""
        rotary = self._rotary_rows(positions, hidden)
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = layer(hidden, rotary, cache, attention, plan)
        output: Tensor = self.norm(hidden)
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] → [rows, vocab]."""
        output: Tensor = self.lm_head(hidden)
        return output

    def _rotary_rows(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine [T, 1, d] of the positions, from a table made on first use."""
        if self._rotary is None:
            dim = self.config.head_dim
            steps = torch.arange(self.config.max_position_embeddings, dtype=torch.float32, device=like.device)
            exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=like.device) / dim
            angles = torch.outer(steps, 1.0 / self._rope_theta**exponents)
            cos, sin = angles.cos(), angles.sin()
            # The sine of the first half is negative: rotate() then needs no negation of its own.
            self._rotary = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1).to(like.dtype)
        cos_rows, sin_rows = self._rotary[positions].unsqueeze(2).unbind(1)
        return cos_rows, sin_rows

    def pack(self, quantization: Quantization | None = None) -> None:
        """Lay the weights out for this machine, once they are loaded."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack(quantization, keep_weight=module.weight is self.embed_tokens)


def parameter_places(model: Qwen3, *, tied: bool) -> dict[str, list[Tensor]]:
    """Where each tensor of a ``Qwen3ForCausalLM`` checkpoint goes: views of this model's (partly fused) parameters."""
    config = model.config
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    places: dict[str, list[Tensor]] = {
        "model.embed_tokens.weight": [model.embed_tokens.data],
        "model.norm.weight": [model.norm.weight.data],
    }
    if not tied:
        places["lm_head.weight"] = [model.lm_head.weight.data]
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        prefix = f"model.layers.{index}."
        attention, mlp = layer.self_attn, layer.mlp
        parts = [("weight", attention.qkv_proj.weight.data, attention.o_proj.weight.data)]
        if attention.qkv_proj.bias is not None and attention.o_proj.bias is not None:
            parts.append(("bias", attention.qkv_proj.bias.data, attention.o_proj.bias.data))
        for kind, qkv, out in parts:
            for name, place in zip(("q_proj", "k_proj", "v_proj"), qkv.split((query, key, key)), strict=True):
                places[f"{prefix}self_attn.{name}.{kind}"] = [place]
            places[f"{prefix}self_attn.o_proj.{kind}"] = [out]
        heads = attention.qk_norm.data.split((config.num_attention_heads, config.num_key_value_heads))
        places[f"{prefix}self_attn.q_norm.weight"] = list(heads[0])
        places[f"{prefix}self_attn.k_norm.weight"] = list(heads[1])
        gate, up = mlp.gate_up_proj.weight.data.chunk(2)
        places[f"{prefix}mlp.gate_proj.weight"] = [gate]
        places[f"{prefix}mlp.up_proj.weight"] = [up]
        places[f"{prefix}mlp.down_proj.weight"] = [mlp.down_proj.weight.data]
        places[f"{prefix}input_layernorm.weight"] = [layer.input_layernorm.weight.data]
        places[f"{prefix}post_attention_layernorm.weight"] = [layer.post_attention_layernorm.weight.data]
    return places


def load_qwen3(
    checkpoint: Checkpoint,
    config: Qwen3Config,
    *,
    tied: bool,
    rename: Callable[[str], str | None],
    dtype: torch.dtype,
    device: torch.device,
) -> Qwen3:
    """The text model of a checkpoint whose tensors ``rename`` maps to the names of ``Qwen3ForCausalLM``."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Qwen3(config)
    finally:
        torch.set_default_dtype(default)
    tied = tied or all(rename(name) != "lm_head.weight" for name in checkpoint.names)
    if tied:
        model.lm_head.weight = model.embed_tokens
    load_parameters(
        checkpoint,
        parameter_places(model, tied=tied),
        lambda name: None if tied and rename(name) == "lm_head.weight" else rename(name),
    )
    return model.eval()


def from_qwen3_checkpoint(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Qwen3:
    """A ``Qwen3ForCausalLM`` directory."""
    config = checkpoint.config
    assert isinstance(config, Qwen3Config)
    return load_qwen3(checkpoint, config, tied=bool(config.tie_word_embeddings), rename=str, dtype=dtype, device=device)
