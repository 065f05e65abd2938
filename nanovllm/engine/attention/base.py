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

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.layers import huge_pages
from nanovllm.engine.layers.token_ops import CacheSlots


@dataclass(frozen=True)
class AttentionBatch:
    """The rows of one step, single-token rows first and those by context length.

    ``block_tables``, lists or int32 [rows, width], may name more blocks than ``context_lens`` (which include the row's
    own tokens) need; what an array holds beyond them may be any of the cache's. ``seats``: of each row its row of an
    array, where that has others; an array is not copied then, and must not change before the step is computed.
    """

    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_tables: Sequence[Sequence[int]] | np.ndarray
    seats: Sequence[int] | None = None


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


def slots_of(batch: AttentionBatch, block_size: int) -> np.ndarray:
    """The cache slot of every new token, int64 [T] in row order: block number times block size plus offset."""
    tables, rows = table_rows(batch, block_size)
    lengths, ends = np.array(batch.query_lens), np.array(batch.context_lens)
    positions = ends - 1
    if len(lengths) and lengths.max() > 1:
        rows = np.repeat(rows, lengths)
        positions = np.arange(len(rows)) + np.repeat(ends - lengths.cumsum(), lengths)
    slots: np.ndarray = tables[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size
    return slots


def last_slots(context_lens: Tensor, block_tables: Tensor, block_size: int) -> Tensor:
    """The slots [n] of the last tokens of contexts [n], from tables [n, width], computed where those are."""
    last = (context_lens - 1).unsqueeze(1)
    return (block_tables.gather(1, last // block_size) * block_size + last % block_size).squeeze(1)


def table_rows(batch: AttentionBatch, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Block tables, int32 [any, width], and of each row of the batch its row of them, int64; an array is not copied."""
    if isinstance(batch.block_tables, np.ndarray) and batch.seats is not None:
        return batch.block_tables, np.array(batch.seats)
    tables = batch.block_tables if isinstance(batch.block_tables, np.ndarray) else padded_tables(batch, block_size)
    return tables, np.arange(len(batch.query_lens))


def padded_tables(batch: AttentionBatch, block_size: int) -> np.ndarray:
    """The block tables, int32 [rows, width] without gaps: as wide as the longest context needs."""
    tables, width = batch.block_tables, -(-max(batch.context_lens) // block_size)
    if isinstance(tables, np.ndarray):
        used = tables[:, :width]
        return np.ascontiguousarray(used) if batch.seats is None else used.take(batch.seats, 0)
    padded = np.zeros((len(tables), width), np.int32)
    for row, table in zip(padded, tables, strict=True):
        known = table[:width]
        row[: len(known)] = known
    return padded


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A cache of zeros; a CPU's takes memory only where it is written, on huge pages."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = huge_pages.zeroed(math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)
