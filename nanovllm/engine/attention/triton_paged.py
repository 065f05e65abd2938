"""Attention on CUDA by our Triton kernel, which reads pages of any size in float32, bfloat16 and float16."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from nanovllm.engine.attention.base import AttentionBatch, SlotAttention, last_slots, padded_tables, slots_of
from nanovllm.engine.kernels.paged_triton import choose_splits, choose_tile, paged_attention
from nanovllm.engine.layers.device_copy import together
from nanovllm.engine.layers.token_ops import CacheSlots

_NARROW = 4096  # tokens


@dataclass(frozen=True)
class TritonMetadata:
    """What the kernel wants to know of a step, int32 on the device; and for the host the longest row and context."""

    slots: Tensor  # [T] int64, as torch wants it
    starts: Tensor  # [rows + 1]
    contexts: Tensor  # [rows]
    tables: Tensor  # [rows, width]
    max_query: int
    max_context: int


class TritonAttention(SlotAttention):
    """A page is [block_size, 2, kv_heads, d], as SdpaAttention's."""

    name = "Triton kernel on the pages"

    def __init__(self, device: torch.device, block_size: int | None = None) -> None:
        """On a CPU the kernel runs in Triton's interpreter, and its launches are those of an H200."""
        self.block_size = block_size or 16
        self._device = device
        self._capability, self._cores = (9, 0), 132
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self._capability = (properties.major, properties.minor)
            self._cores = properties.multi_processor_count

    def allocate(self, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
        """[num_blocks, block_size, 2, kv_heads, d]."""
        return torch.zeros(num_blocks, self.block_size, 2, num_kv_heads, head_dim, dtype=dtype, device=self._device)

    def metadata(self, batch: AttentionBatch) -> TritonMetadata:
        """Slots, first tokens, contexts and the padded block table, in one copy to the device."""
        tables = padded_tables(batch, self.block_size)
        rows = len(tables)
        slots, numbers, pages = together(
            [
                slots_of(batch, self.block_size),
                [0, *accumulate(batch.query_lens), *batch.context_lens],
                tables.ravel(),
            ],
            self._device,
        )
        starts, contexts = numbers.int().tensor_split((rows + 1,))
        return TritonMetadata(
            slots, starts, contexts, pages.int().view(rows, -1), max(batch.query_lens), max(batch.context_lens)
        )

    def decode_contexts(self, limit: int, rows: int) -> tuple[int, ...]:
        """Unused width costs the kernel nothing: a row's own context is cut into shares. But it is gathered every time,
        and most steps have no long context.
        """
        return tuple(sorted({min(limit, _NARROW), limit}))

    def decode_metadata(self, context_lens: Tensor, block_tables: Tensor) -> TritonMetadata:
        """See GraphAttention."""
        return TritonMetadata(
            slots=last_slots(context_lens, block_tables, self.block_size),
            starts=torch.arange(len(context_lens) + 1, dtype=torch.int32, device=context_lens.device),
            contexts=context_lens.int(),
            tables=block_tables.int().contiguous(),
            max_query=1,
            max_context=block_tables.shape[1] * self.block_size,
        )

    def slots(self, cache: Tensor, metadata: TritonMetadata) -> CacheSlots:
        """See SlotAttention."""
        keys, values = cache.view(-1, *cache.shape[2:]).unbind(1)
        return CacheSlots(keys, values, metadata.slots)

    def attend_written(self, query: Tensor, cache: Tensor, metadata: TritonMetadata) -> Tensor:
        """See SlotAttention. All that decides about the launch are numbers of the metadata, which a graph keeps."""
        tokens, heads, dim = query.shape
        kv_heads = cache.shape[3]
        group = heads // kv_heads
        tile = choose_tile(metadata.max_query, group, dim, query.element_size(), self._capability)
        splits = choose_splits(
            len(metadata.contexts),
            tokens,
            metadata.max_context,
            kv_heads=kv_heads,
            tile=tile,
            group=group,
            cores=self._cores,
        )
        return paged_attention(query, cache, metadata.starts, metadata.contexts, metadata.tables, tile, splits)
