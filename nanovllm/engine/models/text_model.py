"""What the engine's execution needs of a text model, hand-written or of transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from nanovllm.engine.attention.base import AttentionBackend


class TextConfig(Protocol):
    """The shape of a text model, as far as memory and inputs depend on it."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""

    @property
    def hidden_size(self) -> int:
        """Columns of an embedding."""

    @property
    def position_axes(self) -> tuple[int, ...] | None:
        """By which of its positions each frequency rotates; None: a token has one position."""

    @property
    def num_axes(self) -> int:
        """How many positions a token has."""

    @property
    def num_attention_heads(self) -> int:
        """Query heads of an attention layer."""

    @property
    def kv_shapes(self) -> tuple[tuple[int, int], ...]:
        """Of every attention layer the heads of keys and values, and their width."""

    def context_limit(self, asked: int | None) -> int:
        """The longest context in tokens; raises ConfigurationError or UnsupportedModel for one that is too long."""


class TextModel(nn.Module, ABC):
    """Token embeddings, layers over paged keys and values, and the head."""

    config: TextConfig
    embed_tokens: nn.Parameter
    lm_head: nn.Module
    has_states = False
    """Whether layers carry a state of each sequence, which no cached prefix has and no rejected draft gives back."""

    packed_file: Path | None = None
    """The file that its packed weights are mapped from; None where they are in the process's own memory."""

    why_no_graphs: str | None = None
    """Why its steps cannot be recorded as CUDA graphs; None where they can."""

    @abstractmethod
    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] → [T, hidden]."""

    @abstractmethod
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
        """Embeddings [T, hidden] at ``positions`` → hidden states [T, hidden], or those of ``wanted`` rows."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] → [rows, vocab]."""
