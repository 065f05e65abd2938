"""Attention on CUDA by others' kernels that read pages themselves: flash-attn, and torch's own varlen_attn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.engine.attention.base import AttentionBatch, SlotAttention, last_slots, padded_tables, slots_of
from nanovllm.engine.layers.device_copy import together
from nanovllm.engine.layers.token_ops import CacheSlots

_SHARED_CONTEXTS = (1024, 4096, 16_384)  # tokens
_MAX_SHARED_ROWS = 16  # with eight heads of keys more rows keep a GPU of 132 multiprocessors busy without shares


@dataclass(frozen=True)
class VarlenRows:
    """Rows that one call of a kernel takes, int32 on the device; the starts count from the first of them."""

    query_starts: Tensor
    context_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_query: int
    max_context: int


@dataclass(frozen=True)
class VarlenMetadata:
    """The slots of a step's new tokens, and its calls: how many tokens each has, and their rows."""

    slots: Tensor
    calls: tuple[tuple[int, VarlenRows], ...]


Kernel = Callable[[Tensor, Tensor, Tensor, VarlenRows], Tensor]
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
        """Slots, and cumulative lengths and the padded block table of each call, in one copy to the device.

        Beside a prompt, rows of one token have a call of their own: the kernels pack their heads and split their
        contexts there, and would fill a block of queries for each of them here.
        """
        groups = _by_length(batch)
        tables = [padded_tables(group, self.block_size) for group in groups]
        numbers = [
            part
            for group, table in zip(groups, tables, strict=True)
            for part in (
                [0, *accumulate(group.query_lens)],
                [0, *accumulate(group.context_lens)],
                list(group.context_lens),
                table.ravel(),
            )
        ]
        slots, *lengths = together([slots_of(batch, self.block_size), *numbers], self._device)
        found = iter([part.int() for part in lengths])
        calls = []
        for group, table in zip(groups, tables, strict=True):
            starts, context_starts, contexts, pages = (next(found) for _ in range(4))
            longest = max(group.query_lens), max(group.context_lens)
            rows = VarlenRows(starts, context_starts, contexts, pages.view(len(table), -1), *longest)
            calls.append((sum(group.query_lens), rows))
        return VarlenMetadata(slots, tuple(calls))

    def decode_contexts(self, limit: int, rows: int) -> tuple[int, ...]:
        """Few rows are cut into shares of the table's width, and what is beyond a row's context leaves shares empty."""
        contexts = _SHARED_CONTEXTS if rows <= _MAX_SHARED_ROWS else ()
        return tuple(sorted({limit, *(context for context in contexts if context < limit)}))

    def decode_metadata(self, context_lens: Tensor, block_tables: Tensor) -> VarlenMetadata:
        """See GraphAttention."""
        lengths = context_lens.int()
        rows = VarlenRows(
            query_starts=torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device),
            context_starts=F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            context_lens=lengths,
            block_tables=block_tables.int().contiguous(),
            max_query=1,
            max_context=block_tables.shape[1] * self.block_size,
        )
        return VarlenMetadata(last_slots(context_lens, block_tables, self.block_size), ((len(lengths), rows),))

    def slots(self, cache: Tensor, metadata: VarlenMetadata) -> CacheSlots:
        """See SlotAttention."""
        keys, values = cache.flatten(1, 2).unbind(0)
        return CacheSlots(keys, values, metadata.slots)

    def attend_written(self, query: Tensor, cache: Tensor, metadata: VarlenMetadata) -> Tensor:
        """See SlotAttention."""
        keys, values = cache.unbind(0)
        if len(metadata.calls) == 1:
            return self._kernel(query, keys, values, metadata.calls[0][1])
        parts = query.split([tokens for tokens, _ in metadata.calls])
        return torch.cat(
            [self._kernel(part, keys, values, rows) for part, (_, rows) in zip(parts, metadata.calls, strict=True)]
        )


def _by_length(batch: AttentionBatch) -> list[AttentionBatch]:
    """Rows of one token, which stand first, and the others, as far as there are both."""
    singles = sum(length == 1 for length in batch.query_lens)
    cuts = (slice(0, singles), slice(singles, None)) if 0 < singles < len(batch.query_lens) else (slice(None),)
    shared = batch.seats is not None
    return [
        replace(
            batch,
            query_lens=batch.query_lens[cut],
            context_lens=batch.context_lens[cut],
            block_tables=batch.block_tables if shared else batch.block_tables[cut],
            seats=batch.seats and batch.seats[cut],
        )
        for cut in cuts
    ]


def flash_attn_kernels() -> Kernel:
    """flash-attn 2 over a block table, by its general call alone.

    For one token a row that packs the heads that share keys and splits contexts, as ``flash_attn_with_kvcache`` does;
    and the latter waits for the device in every layer from 2.8.4 on, which a recording of a step refuses. Only models
    whose heads share no keys lose something: their contexts are not split.
    """
    from flash_attn import flash_attn_varlen_func

    def attend(query: Tensor, keys: Tensor, values: Tensor, rows: VarlenRows) -> Tensor:
        return flash_attn_varlen_func(
            query, keys, values, rows.query_starts, rows.context_starts, rows.max_query, rows.max_context,
            causal=True, block_table=rows.block_tables,
        )  # fmt: skip

    return attend


def torch_varlen_kernel() -> Kernel:
    """torch's own flash attention over a block table (torch 2.12 and later)."""
    from torch.nn.attention.varlen import varlen_attn

    def attend(query: Tensor, keys: Tensor, values: Tensor, rows: VarlenRows) -> Tensor:
        # A single token sees its whole context, causal or not. Said so, torch does not take the path that writes every
        # row over the first (pytorch#194167).
        window = (-1, -1) if rows.max_query == 1 else (-1, 0)
        output = varlen_attn(
            query, keys, values, rows.query_starts, rows.context_starts, rows.max_query, rows.max_context,
            window_size=window, enable_gqa=True, seqused_k=rows.context_lens, block_table=rows.block_tables,
        )  # fmt: skip
        assert isinstance(output, Tensor)  # a pair only when return_aux is asked for
        return output

    return attend
