"""Attention on a CPU by our kernel, which reads pages in place."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from nanovllm.engine.attention.base import AttentionBatch, _zeros, padded_tables, slots_of


@dataclass(frozen=True)
class _CpuMetadata:
    slots: Tensor
    starts: Tensor
    contexts: Tensor
    block_tables: Tensor


class PagedCpuAttention:
    """Our kernel for CPUs, which reads pages itself; a page is [2, kv_heads, positions, d], both multiples of 16.

    A token's output is the same to the bit whatever stands beside it and however its prompt was cut into chunks.
    """

    name = "our kernel on the pages"

    def __init__(self, block_size: int | None = None) -> None:
        """The kernels are loaded: `kernels.missing` was asked."""
        self.block_size = block_size or 16

    def allocate(self, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
        """[num_blocks, 2, kv_heads, positions, d]: whole tiles of positions, whole vectors; padding stays zero."""
        positions, padded = (size + -size % 16 for size in (self.block_size, head_dim))
        return _zeros((num_blocks, 2, num_kv_heads, positions, padded), dtype, torch.device("cpu"))

    def metadata(self, batch: AttentionBatch) -> _CpuMetadata:
        """Slots, first tokens, contexts and the padded block table."""
        return _CpuMetadata(
            slots=torch.tensor(slots_of(batch, self.block_size)),
            starts=torch.tensor([0, *accumulate(batch.query_lens)]),
            contexts=torch.tensor(batch.context_lens),
            block_tables=torch.tensor(padded_tables(batch, self.block_size), dtype=torch.int32),
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, metadata: _CpuMetadata) -> Tensor:
        """See AttentionBackend."""
        output: Tensor = torch.ops.nanovllm.paged_attention(
            query, key, value, cache, self.block_size,
            metadata.slots, metadata.starts, metadata.contexts, metadata.block_tables, query.shape[-1] ** -0.5,
        )  # fmt: skip
        return output
