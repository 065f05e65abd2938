"""The interface of attention over paged keys and values.

A backend computes the step's metadata once, and then, layer by layer, writes the new keys and values to their slots and
attends with the queries. All state comes in as arguments. A row is the tokens of one sequence in the step. Rows of a
single token come first, so that decoding is one batched call.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from nanovllm.engine.layers import huge_pages
from nanovllm.engine.layers.token_ops import CacheSlots


@dataclass(frozen=True)
class AttentionBatch:
    """The rows of one step, single-token rows first and those by context length.

    ``block_tables`` may name more blocks than ``context_lens`` (which include the row's own tokens) need.
    """

    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Sequence[Sequence[int]]


class AttentionBackend(Protocol):
    """What a model layer needs of attention; ``cache`` is one layer's keys and values, as ``allocate`` shaped them."""

    name: str
    """What computes, and on what, for diagnostics."""
    block_size: int

    def allocate(self, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
        """Zeroed keys and values of one layer."""

    def metadata(self, batch: AttentionBatch) -> Any:
        """What all layers of this step share; handed back to ``attend`` as it is."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, metadata: Any) -> Tensor:
        """Write ``key`` and ``value`` [T, kv_heads, d] to their slots and attend with ``query`` [T, heads, d].

        Every token sees the tokens of its own sequence up to itself. Returns [T, heads, d].
        """


class SlotAttention(ABC):
    """A backend that attends to keys and values in the cache, whoever wrote them: one kernel may rotate and write."""

    @abstractmethod
    def slots(self, cache: Tensor, metadata: Any) -> CacheSlots:
        """Where the step's keys and values go; a view of ``cache``."""

    @abstractmethod
    def attend_written(self, query: Tensor, cache: Tensor, metadata: Any) -> Tensor:
        """`AttentionBackend.attend` once the step's keys and values are in their slots."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, metadata: Any) -> Tensor:
        """See AttentionBackend."""
        self.slots(cache, metadata).write(key, value)
        return self.attend_written(query, cache, metadata)


@runtime_checkable
class GraphAttention(AttentionBackend, Protocol):
    """A backend whose metadata of single-token rows is made on the device alone, so that a CUDA graph can hold it."""

    def decode_contexts(self, limit: int, rows: int) -> tuple[int, ...]:
        """The longest contexts, ascending, for which a graph of ``rows`` tokens pays, none beyond ``limit`` tokens."""

    def decode_metadata(self, context_lens: Tensor, block_tables: Tensor) -> Any:
        """The metadata of rows of one token each, from int64 contexts [n] and tables [n, width] on the device.

        No value may reach the host. A row's unused blocks may be any of the cache's.
        """


def slots_of(batch: AttentionBatch, block_size: int) -> list[int]:
    """The cache slot of every new token, in row order: block number times block size plus offset."""
    slots: list[int] = []
    for length, context, table in zip(batch.query_lens, batch.context_lens, batch.block_tables, strict=True):
        start = context - length
        if length == 1:
            slots.append(table[start // block_size] * block_size + start % block_size)
            continue
        for block in range(start // block_size, (context - 1) // block_size + 1):
            low, high = max(start, block * block_size), min(context, (block + 1) * block_size)
            first = (table[block] - block) * block_size
            slots.extend(range(first + low, first + high))
    return slots


def last_slots(context_lens: Tensor, block_tables: Tensor, block_size: int) -> Tensor:
    """The slots [n] of the last tokens of contexts [n], from tables [n, width], computed where those are."""
    last = (context_lens - 1).unsqueeze(1)
    return (block_tables.gather(1, last // block_size) * block_size + last % block_size).squeeze(1)


def padded_tables(batch: AttentionBatch, block_size: int) -> list[list[int]]:
    """The block tables, all as wide as the longest context needs."""
    width = -(-max(batch.context_lens) // block_size)
    return [[*table[:width], *[0] * (width - len(table))] for table in batch.block_tables]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A cache of zeros; a CPU's takes memory only where it is written, on huge pages."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = huge_pages.zeroed(math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)
