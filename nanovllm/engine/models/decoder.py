"""The decoder that Llama, Qwen2 and Qwen3 share: grouped-query attention, rotary positions, gated SiLU feed-forward.

Where the families differ is a field of ``DecoderConfig``, set in each family's file. The tokens of all sequences of a
step are one dimension [T]; which of them attend to one another is decided by the attention backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.engine.attention.base import AttentionBackend, SlotAttention
from nanovllm.engine.layers.linear import Linear
from nanovllm.engine.layers.rotary import check_rope, known_positions, rotary_table
from nanovllm.engine.layers.token_ops import Rotary, add_rms_norm, gated_silu, rotate_and_write, rotate_heads
from nanovllm.engine.models.text_model import TextModel
from nanovllm.errors import ConfigurationError, UnsupportedModel


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder, and the options of its family."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    sliding_window: int | None  # the tokens that a layer sees at most; None: all
    source: Any  # transformers' own configuration, which knows about rotary positions
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    position_axes: tuple[int, ...] | None = None  # by which of its positions each frequency rotates; None: it has one

    @classmethod
    def of(cls, config: Any, **family: Any) -> Self:
        """Read what the families' configurations have in common; ``family`` are the fields that have a default.

        Raises UnsupportedModel for an option of the family that is not implemented.
        """
        if config.hidden_act != "silu":
            raise UnsupportedModel(f"hidden_act {config.hidden_act!r} is not supported, only 'silu' is")
        kinds = getattr(config, "layer_types", None) or ()
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise UnsupportedModel(f"layers of type {kind!r} are not supported, only 'full_attention' ones are")
        window = getattr(config, "sliding_window", None)
        if "sliding_attention" in kinds and not hasattr(config, "sliding_window"):
            raise UnsupportedModel(
                f"config.json: layer_types has 'sliding_attention', and {config.model_type!r} has no sliding_window: "
                "its layers are 'full_attention'"
            )
        check_rope(config)
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            max_positions=known_positions(config),
            rms_norm_eps=config.rms_norm_eps,
            sliding_window=window if "sliding_attention" in kinds else None,
            source=config,
            **family,
        )

    @property
    def num_axes(self) -> int:
        """How many positions a token has."""
        return 1 if self.position_axes is None else 1 + max(self.position_axes)

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]:
        """Heads of keys and values, and their width, of every layer."""
        return ((self.num_key_value_heads, self.head_dim),) * self.num_hidden_layers

    def context_limit(self, asked: int | None) -> int:
        """The longest context in tokens: what was ``asked`` for, or else all positions that the model knows.

        Raises ConfigurationError beyond those, and UnsupportedModel beyond a sliding window.
        """
        limit = asked or self.max_positions
        if limit > self.max_positions:
            raise ConfigurationError(
                f"max_model_len={limit}, but the model's positions end at {self.max_positions}; where its authors "
                "extend them (YaRN), config.json needs the rope_scaling of their model card"
            )
        if self.sliding_window is not None and limit > self.sliding_window:
            raise UnsupportedModel(
                f"sliding_window={self.sliding_window} is not supported with max_model_len={limit}; up to "
                f"max_model_len={self.sliding_window} it is full attention"
            )
        return limit


def _rows(hidden: Tensor, wanted: Tensor | None) -> Tensor:
    return hidden if wanted is None else hidden.index_select(0, wanted)


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape), requires_grad=False)


class RMSNorm(nn.Module):
    """Scale a vector to unit root mean square, then by a learnt weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = _weight(size)
        self._eps = eps

    def forward(self, residual: Tensor, update: Tensor | None) -> Tensor:
        """[T, size] → [T, size], of ``residual`` with ``update`` added to it in place."""
        return add_rms_norm(residual, update, self.weight, self._eps)


class Attention(nn.Module):
    """Self-attention. Query, key and value weights are one matrix; queries and keys are rotated in one call."""

    qk_norm: nn.Parameter | None

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.num_rotary = self.num_heads + self.num_kv_heads
        total = (self.num_rotary + self.num_kv_heads) * self.head_dim
        self.qkv_proj = Linear(config.hidden_size, total, bias=config.qkv_bias)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.output_bias)
        # A row for each query head, then one for each key head.
        self.qk_norm = _weight(self.num_rotary, self.head_dim) if config.qk_norm else None
        self._eps = config.rms_norm_eps

    def forward(
        self, hidden: Tensor, rotary: Rotary, cache: Tensor, attention: AttentionBackend, metadata: Any
    ) -> Tensor:
        """[T, hidden] → [T, heads * d], which ``o_proj`` brings back to [T, hidden]."""
        qkv = self.qkv_proj(hidden).view(-1, self.num_rotary + self.num_kv_heads, self.head_dim)
        if isinstance(attention, SlotAttention):
            query = rotate_and_write(qkv, self.qk_norm, self._eps, rotary, attention.slots(cache, metadata))
            return attention.attend_written(query, cache, metadata).reshape(len(hidden), -1)
        qk = rotate_heads(qkv[:, : self.num_rotary], self.qk_norm, self._eps, rotary)
        query, key = qk.split((self.num_heads, self.num_kv_heads), 1)
        return attention.attend(query, key, qkv[:, self.num_rotary :], cache, metadata).reshape(len(hidden), -1)


class MLP(nn.Module):
    """down(silu(gate x) * up x), gate and up as one matrix."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, hidden] → [T, hidden]."""
        return self.down_proj(gated_silu(self.gate_up_proj(hidden)))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream and added back to it.

    A sum and the norm of it are one call, so that what the feed-forward adds is left to the next norm.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        residual: Tensor,
        update: Tensor | None,
        rotary: Rotary,
        cache: Tensor,
        attention: AttentionBackend,
        metadata: Any,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream [T, hidden], and what is yet to be added to it, before the layer → the same behind it.

        Or the ``wanted`` rows of both: all leave their keys and values in the cache. Writes to ``residual``.
        """
        attended = self.self_attn(self.input_layernorm(residual, update), rotary, cache, attention, metadata)
        residual = _rows(residual, wanted)
        normed = self.post_attention_layernorm(residual, self.self_attn.o_proj(_rows(attended, wanted)))
        return residual, self.mlp(normed)


class Decoder(TextModel):
    """The text model: embedding, layers, norm, and the output head for the rows that sample."""

    config: DecoderConfig
    lm_head: Linear

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = _weight(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self._rotary: Tensor | None = None
        self._axes: Tensor | None = None

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] → [T, hidden]."""
        return F.embedding(token_ids, self.embed_tokens)

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        caches: Sequence[Tensor],
        attention: AttentionBackend,
        metadata: Any,
        images: Sequence[tuple[int, Tensor]] = (),
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Embeddings [T, hidden] at ``positions`` [T] or [T, axes] → normalised hidden states [T, hidden].

        Of ``wanted`` rows [n] alone, if they are named: the last layer leaves the others out once it has their keys
        and values. ``hidden`` is written to.

        ``images``: first token and embeddings [n, width] of those that stand among the tokens. What is wider than
        hidden is added behind the first layers, hidden columns each (DeepStack, arXiv 2406.04334).
        """
        size = self.config.hidden_size
        for first, embedding in images:
            hidden[first : first + len(embedding)] = embedding[:, :size]
        levels = max((embedding.shape[1] // size - 1 for _, embedding in images), default=0)
        kept_by_last = wanted if levels < len(self.layers) else None  # else something is still added behind it
        rotary = self._rotary_rows(positions, hidden)
        update: Tensor | None = None
        for depth, (layer, cache) in enumerate(zip(self.layers, caches, strict=True), 1):
            kept = kept_by_last if depth == len(self.layers) else None
            hidden, update = layer(hidden, update, rotary, cache, attention, metadata, kept)
            if depth <= levels:
                hidden, update = hidden.add_(update), None
                for first, embedding in images:
                    if embedding.shape[1] > depth * size:
                        hidden[first : first + len(embedding)] += embedding[:, depth * size : (depth + 1) * size]
        if kept_by_last is not wanted:
            hidden = _rows(hidden, wanted)  # nothing is left to add: an image was added behind the last layer
        return self.norm(hidden, update)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] → [rows, vocab]."""
        return self.lm_head(hidden)

    def _rotary_rows(self, positions: Tensor, like: Tensor) -> Rotary:
        """Cosine and signed sine [T, 1, d] of the positions, from a table made on first use."""
        if self._rotary is None:
            self._rotary = rotary_table(self.config.source, self.config.head_dim, like.dtype, like.device)
        if positions.ndim == 1:
            rows = self._rotary[positions]
        else:
            if self._axes is None:
                self._axes = torch.tensor(self.config.position_axes, device=positions.device).repeat(2)
            dims = torch.arange(self.config.head_dim, device=positions.device)
            rows = self._rotary[positions[:, self._axes], :, dims].transpose(1, 2).contiguous()
        cos_rows, sin_rows = rows.unsqueeze(2).unbind(1)
        return cos_rows, sin_rows
