"""Attention on a CPU by our kernel, which reads pages in place."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from nanovllm.engine.attention.base import AttentionBatch, slots_of, table_rows, zeros
from nanovllm.errors import counted


class PagedCpuAttention:
    """Our kernel for CPUs, which `kernels.missing` loads; a page is [2, kv_heads, positions, d], both multiples of 16.

    A token's output is the same to the bit whatever stands beside it. It is so however its prompt was cut into chunks,
    too, where all rows are computed alike: without ``tiles_from``, or from 1 on.
    """

    name = "our kernel on the pages"

    def __init__(self, block_size: int | None = None, *, tiles_from: int | None = None) -> None:
        """``tiles_from``: the query vectors of a row for a key head from which on AMX tiles multiply bfloat16."""
        self.block_size = block_size or 16
        self.tiles_from = tiles_from
        if tiles_from is not None:
            self.name += f", from {counted(tiles_from, 'query vector')} on by AMX tiles"

    def allocate(self, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
        """[num_blocks, 2, kv_heads, positions, d]: whole tiles of positions, whole vectors; padding stays zero."""
        positions, padded = (size + -size % 16 for size in (self.block_size, head_dim))
        return zeros((num_blocks, 2, num_kv_heads, positions, padded), dtype, torch.device("cpu"))

    def metadata(self, batch: AttentionBatch) -> tuple[Tensor, ...]:
        """Slots, first tokens, contexts, block tables and the row of them that is each row's."""
        tables, rows = table_rows(batch, self.block_size)
        return (
            torch.from_numpy(slots_of(batch, self.block_size)),
            torch.tensor([0, *accumulate(batch.query_lens)]),
            torch.tensor(batch.context_lens),
            torch.from_numpy(tables),
            torch.from_numpy(rows),
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, metadata: tuple[Tensor, ...]) -> Tensor:
        """See AttentionBackend."""
        tiles_from = self.tiles_from if query.dtype == torch.bfloat16 else None
        return torch.ops.nanovllm.paged_attention(
            query, key, value, cache, self.block_size, *metadata, query.shape[-1] ** -0.5, tiles_from
        )
