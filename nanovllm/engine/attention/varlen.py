"""Attention on CUDA by others' kernels that read pages themselves: flash-attn, and torch's own varlen_attn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.engine.attention.base import AttentionBatch, SlotAttention, last_slots, padded_tables, slots_of
from nanovllm.engine.layers.device_copy import together
from nanovllm.engine.layers.token_ops import CacheSlots

_SHARED_CONTEXTS = (1024, 4096, 16_384)  # tokens
_MAX_SHARED_ROWS = 16  # with eight heads of keys more rows keep a GPU of 132 multiprocessors busy without shares


@dataclass(frozen=True)
class VarlenMetadata:
    """What the kernels want to know of a step; lengths and tables are int32 on the device."""

    slots: Tensor
    query_starts: Tensor
    context_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_query: int
    max_context: int


Kernel = Callable[[Tensor, Tensor, Tensor, VarlenMetadata], Tensor]
"""Queries [T, heads, d] over keys and values [num_blocks, block_size, kv_heads, d], each row seeing its context."""


class PagedVarlenAttention(SlotAttention):
    """A cache is [2, num_blocks, block_size, kv_heads, d]; the kernels want pages of a multiple of 256 tokens."""

    def __init__(
        self, device: torch.device, kernel: Kernel, block_size: int | None = None, *, name: str = "paged varlen kernel"
    ) -> None:
        """``kernel`` is one of :func:`flash_attn_kernels` and :func:`torch_varlen_kernel`."""
        self.block_size = block_size or 256
        self.name = name
        self._device = device
        self._kernel = kernel

    def allocate(self, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
        """[2, num_blocks, block_size, kv_heads, d]."""
        return torch.zeros(2, num_blocks, self.block_size, num_kv_heads, head_dim, dtype=dtype, device=self._device)

    def metadata(self, batch: AttentionBatch) -> VarlenMetadata:
        """Slots, cumulative lengths and the padded block table, in one copy to the device."""
        tables = padded_tables(batch, self.block_size)
        slots, *lengths, pages = together(
            [
                slots_of(batch, self.block_size),
                [0, *accumulate(batch.query_lens)],
                [0, *accumulate(batch.context_lens)],
                batch.context_lens,
                list(chain.from_iterable(tables)),
            ],
            self._device,
        )
        query_starts, context_starts, context_lens = (part.int() for part in lengths)
        return VarlenMetadata(
            slots=slots,
            query_starts=query_starts,
            context_starts=context_starts,
            context_lens=context_lens,
            block_tables=pages.int().view(len(tables), -1),
            max_query=max(batch.query_lens),
            max_context=max(batch.context_lens),
        )

    def decode_contexts(self, limit: int, rows: int) -> tuple[int, ...]:
        """Few rows are cut into shares of the table's width, and what is beyond a row's context leaves shares empty."""
        contexts = _SHARED_CONTEXTS if rows <= _MAX_SHARED_ROWS else ()
        return tuple(sorted({limit, *(context for context in contexts if context < limit)}))

    def decode_metadata(self, context_lens: Tensor, block_tables: Tensor) -> VarlenMetadata:
        """See GraphAttention."""
        lengths = context_lens.int()
        return VarlenMetadata(
            slots=last_slots(context_lens, block_tables, self.block_size),
            query_starts=torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device),
            context_starts=F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            context_lens=lengths,
            block_tables=block_tables.int().contiguous(),
            max_query=1,
            max_context=block_tables.shape[1] * self.block_size,
        )

    def slots(self, cache: Tensor, metadata: VarlenMetadata) -> CacheSlots:
        """See SlotAttention."""
        keys, values = cache.flatten(1, 2).unbind(0)
        return CacheSlots(keys, values, metadata.slots)

    def attend_written(self, query: Tensor, cache: Tensor, metadata: VarlenMetadata) -> Tensor:
        """See SlotAttention."""
        keys, values = cache.unbind(0)
        return self._kernel(query, keys, values, metadata)


def flash_attn_kernels() -> Kernel:
    """flash-attn 2 over a block table: its call for decoding where every row is one token, else the general one."""
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

    def attend(query: Tensor, keys: Tensor, values: Tensor, metadata: VarlenMetadata) -> Tensor:
        if metadata.max_query == 1:
            return flash_attn_with_kvcache(
                query.unsqueeze(1), keys, values,
                cache_seqlens=metadata.context_lens, block_table=metadata.block_tables, causal=True,
            ).squeeze(1)  # fmt: skip
        return flash_attn_varlen_func(
            query, keys, values, metadata.query_starts, metadata.context_starts,
            metadata.max_query, metadata.max_context, causal=True, block_table=metadata.block_tables,
        )  # fmt: skip

    return attend


def torch_varlen_kernel() -> Kernel:
    """torch's own flash attention over a block table (torch 2.12 and later)."""
    from torch.nn.attention.varlen import varlen_attn

    def attend(query: Tensor, keys: Tensor, values: Tensor, metadata: VarlenMetadata) -> Tensor:
        # A single token sees its whole context, causal or not. Said so, torch does not take the path that writes every
        # row over the first (pytorch#194167).
        window = (-1, -1) if metadata.max_query == 1 else (-1, 0)
        output = varlen_attn(
            query, keys, values, metadata.query_starts, metadata.context_starts,
            metadata.max_query, metadata.max_context,
            window_size=window, enable_gqa=True, seqused_k=metadata.context_lens, block_table=metadata.block_tables,
        )  # fmt: skip
        assert isinstance(output, Tensor)  # a pair only when return_aux is asked for
        return output

    return attend
