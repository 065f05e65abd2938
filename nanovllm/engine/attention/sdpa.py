"""Attention by torch's scaled_dot_product_attention on gathered copies of the pages."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanovllm.engine.attention.base import AttentionBatch, last_slots, padded_tables, slots_of, zeros
from nanovllm.engine.layers.device_copy import together

_GRAPH_CONTEXTS = (512, 2048)  # tokens


@dataclass(frozen=True)
class _DecodeGroup:
    """Single-token rows [start, end) of similar context: pages [rows * width], additive mask [rows, 1, 1, ctx]."""

    start: int
    end: int
    pages: Tensor
    mask: Tensor


@dataclass(frozen=True)
class _PrefillRow:
    """A row of many tokens [start, end); without ``pages`` its context is the row itself."""

    start: int
    end: int
    context: int
    pages: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class _SdpaMetadata:
    slots: Tensor
    decodes: tuple[_DecodeGroup, ...]
    prefills: tuple[_PrefillRow, ...]


class SdpaAttention:
    """Gather pages, then torch's scaled_dot_product_attention: for every machine that has nothing better.

    A page is [block_size, 2, kv_heads, d], keys and values together: one gather fetches both, in contiguous copies.
    """

    name = "torch SDPA on copies of the pages"

    def __init__(
        self, device: torch.device, dtype: torch.dtype, block_size: int | None = None, *, reason: str = ""
    ) -> None:
        """``dtype`` is the model's; ``reason``: why nothing faster was chosen."""
        self.block_size = block_size or 16
        self.reason = reason
        self._device = device
        self._dtype = dtype
        # On a CPU, gathering into memory of its own is ten times faster than into a fresh allocation, which faults page
        # by page. A GPU's allocator keeps its memory; and a graph would go on to use a workspace that was given up.
        self._workspace = torch.empty(0, dtype=dtype, device=device)

    def allocate(self, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
        """[num_blocks, block_size, 2, kv_heads, d]; zeros, since a masked NaN would still be NaN times zero."""
        return zeros((num_blocks, self.block_size, 2, num_kv_heads, head_dim), dtype, self._device)

    def metadata(self, batch: AttentionBatch) -> _SdpaMetadata:
        """Slots, pages and masks of the step, each in one tensor."""
        num_decodes = sum(length == 1 for length in batch.query_lens)
        tables = padded_tables(batch, self.block_size)
        decodes: list[_DecodeGroup] = []
        start = 0
        while start < num_decodes:
            # Rows up to twice as long as the shortest share a group: padding costs less than another call.
            limit = 2 * self._num_pages(batch.context_lens[start]) + 2
            end = start + 1
            while end < num_decodes and self._num_pages(batch.context_lens[end]) <= limit:
                end += 1
            decodes.append(self._decode_group(batch, tables, start, end))
            start = end
        prefills: list[_PrefillRow] = []
        for index in range(num_decodes, len(batch.query_lens)):
            prefills.append(self._prefill_row(batch, tables[index], index, start))
            start += batch.query_lens[index]
        (slots,) = together([slots_of(batch, self.block_size)], self._device)
        return _SdpaMetadata(slots, tuple(decodes), tuple(prefills))

    def decode_contexts(self, limit: int, rows: int) -> tuple[int, ...]:
        """Rows are copied as wide as the table: short ones have a narrow table, and the longest no graph."""
        return tuple(sorted({min(limit, context) for context in _GRAPH_CONTEXTS}))

    def decode_metadata(self, context_lens: Tensor, block_tables: Tensor) -> _SdpaMetadata:
        """See GraphAttention."""
        group = _DecodeGroup(
            0, len(context_lens), block_tables.flatten(), self._mask(context_lens, block_tables.shape[1])
        )
        return _SdpaMetadata(last_slots(context_lens, block_tables, self.block_size), (group,), ())

    def _num_pages(self, context: int) -> int:
        return -(-context // self.block_size)

    def _decode_group(self, batch: AttentionBatch, tables: np.ndarray, start: int, end: int) -> _DecodeGroup:
        contexts = batch.context_lens[start:end]
        width = self._num_pages(max(contexts))
        used = [[self._num_pages(context)] for context in contexts]
        # Masked, but no page of another sequence: its keys and values may be no numbers.
        pages = np.where(np.arange(width) < used, tables[start:end, :width], tables[start:end, :1])
        lengths, flat_pages = together([contexts, pages.ravel()], self._device)
        return _DecodeGroup(start, end, flat_pages, self._mask(lengths, width))

    def _mask(self, context_lens: Tensor, width: int) -> Tensor:
        """Minus infinity beyond each row's context: [rows, 1, 1, tokens of ``width`` pages]."""
        beyond = torch.arange(width * self.block_size, device=self._device) >= context_lens.view(-1, 1, 1, 1)
        return torch.zeros(beyond.shape, dtype=self._dtype, device=self._device).masked_fill_(beyond, float("-inf"))

    def _prefill_row(self, batch: AttentionBatch, table: np.ndarray, index: int, start: int) -> _PrefillRow:
        length, context = batch.query_lens[index], batch.context_lens[index]
        if length == context:
            return _PrefillRow(start, start + length, context, None, None)
        (pages,) = together([table[: self._num_pages(context)]], self._device)
        mask = torch.full((length, context), float("-inf"), dtype=self._dtype, device=self._device)
        return _PrefillRow(start, start + length, context, pages, mask.triu_(context - length + 1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, metadata: _SdpaMetadata) -> Tensor:
        """See AttentionBackend."""
        cache.view(-1, *cache.shape[2:]).index_copy_(0, metadata.slots, torch.stack((key, value), 1))
        if len(metadata.decodes) == 1 and not metadata.prefills:
            return self._decode(query, cache, metadata.decodes[0])
        output = torch.empty_like(query)
        for group in metadata.decodes:
            output[group.start : group.end] = self._decode(query[group.start : group.end], cache, group)
        for row in metadata.prefills:
            part = slice(row.start, row.end)
            if row.pages is None:
                keys, values = key[part], value[part]
            else:
                keys, values = self._gather(cache, row.pages).view(-1, *cache.shape[2:])[: row.context].unbind(1)
            # Heads that share keys are a batch: no kernel of torch's for CUDA takes both enable_gqa and a mask.
            heads = query[part].unflatten(1, (keys.shape[1], -1)).permute(1, 2, 0, 3)
            shared = (len(heads), heads.shape[1], -1, -1)
            output[part] = (
                F.scaled_dot_product_attention(
                    heads,
                    keys.transpose(0, 1).unsqueeze(1).expand(shared),
                    values.transpose(0, 1).unsqueeze(1).expand(shared),
                    attn_mask=row.mask,
                    is_causal=row.mask is None,
                )
                .permute(2, 0, 1, 3)
                .flatten(1, 2)
            )
        return output

    def _decode(self, query: Tensor, cache: Tensor, group: _DecodeGroup) -> Tensor:
        rows, kv_heads = group.end - group.start, cache.shape[3]
        keys, values = self._gather(cache, group.pages).view(rows, -1, *cache.shape[2:]).unbind(2)
        # The heads that share keys are so many queries of one head, which every kernel of torch takes.
        heads = query.view(rows, kv_heads, -1, query.shape[-1])
        output = F.scaled_dot_product_attention(
            heads, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=group.mask
        )
        return output.reshape(query.shape)

    def _gather(self, cache: Tensor, pages: Tensor) -> Tensor:
        if not cache.is_cpu:
            return cache.index_select(0, pages)
        shape = (len(pages), *cache.shape[1:])
        size = len(pages) * cache[0].numel()
        if self._workspace.numel() < size:
            self._workspace = torch.empty(size + size // 2, dtype=cache.dtype, device=cache.device)
        return torch.index_select(cache, 0, pages, out=self._workspace[:size].view(shape))
