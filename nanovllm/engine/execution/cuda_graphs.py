"""CUDA graphs: the kernels of a small step, captured once and then launched by a single call.

Launching the kernels of a small model one by one from Python takes longer than computing them. A graph replays them on
the same memory, so its inputs are one tensor that every step writes to, and there are graphs of a few sizes: a step
runs in the smallest that holds its tokens, and the rows left over are padding: their logits are not read, and their
keys and values go to a spare block. Block tables stay on the device, one row a seat; a step sends the cells that have
changed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.attention.base import AttentionBackend, GraphAttention
from nanovllm.engine.config import EngineConfig
from nanovllm.engine.execution.tokens_ahead import TokensAhead
from nanovllm.engine.layers.device_copy import move, to_device, together
from nanovllm.engine.models.decoder import Decoder
from nanovllm.engine.scheduling.block_tables import BlockTables

Compute = Callable[[], Any]
Replay = Callable[[], Tensor]
Recorder = Callable[[Compute], Compute]
"""Captures a computation on tensors of fixed addresses; returns its replay."""

_MAX_STEP_TOKENS = 512  # beyond them computing takes longer than launching
_MAX_ROW_TOKENS = 16  # drafts or forced ones: each of them reads the whole context for itself
_NUM_COLUMNS = 4  # of a graph's inputs: token, position, context length, seat
_GRAPH_LAYER_BYTES = 128 << 10  # what CUDA keeps of a layer's twenty kernels in a graph, about 6 KiB each


class CudaRecorder:
    """Records into CUDA graphs that share one pool of memory, which is right as long as they run one at a time.

    All of it happens with ``device`` as the current one, whichever the thread's is: torch waits for the current device
    before a capture, which would leave a context of half a gigabyte on another GPU, and not wait for this one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Compute:
        """Run ``compute`` once, so that libraries set themselves up, then record it."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                compute()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            # An engine in another thread may go on meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                compute()
        return graph.replay


def choose_recorder(device: torch.device) -> Recorder | None:
    """The recorder for this device; None where there are no graphs."""
    return CudaRecorder(device) if device.type == "cuda" else None


def why_no_graphs(config: EngineConfig, attention: AttentionBackend, recorder: Recorder | None) -> str | None:
    """Why decode steps do not run as graphs; None if they do."""
    if config.enforce_eager:
        return "enforce_eager=True"
    if recorder is None:
        return "they are for CUDA"
    if not isinstance(attention, GraphAttention):
        return f"{type(attention).__name__} plans its steps on the host"
    return None


def graph_sizes(max_tokens: int) -> list[int]:
    """The sizes for steps of up to ``max_tokens``, ascending: fine where a token more costs much, then by sixteens."""
    largest = min(max_tokens, _MAX_STEP_TOKENS)
    return [size for size in (1, 2, 4, 8, *range(16, largest, 16)) if size < largest] + [largest]


def graph_shapes(attention: GraphAttention, max_tokens: int, max_context: int) -> list[tuple[int, int]]:
    """The tokens and the longest context of every graph, in the order of recording: the largest first.

    ``max_tokens``: of a step; ``max_context``: of the longest sequence.
    """
    shapes = [
        (size, context)
        for size in graph_sizes(max_tokens)
        for context in attention.decode_contexts(max_context, rows=size)
    ]
    return sorted(shapes, key=lambda shape: (shape[1], shape[0]), reverse=True)


def graph_bytes(model: Decoder, attention: GraphAttention, shapes: Sequence[tuple[int, int]], num_seats: int) -> int:
    """Bytes that graphs take beside their pool: logits, inputs, block tables, and by estimate what CUDA keeps."""
    tokens, context = shapes[0]
    logits = tokens * model.config.vocab_size * model.embed_tokens.dtype.itemsize
    inputs = 8 * tokens * _NUM_COLUMNS + 4 * (num_seats + 1) * -(-context // attention.block_size)
    return logits + inputs + len(shapes) * len(model.config.kv_shapes) * _GRAPH_LAYER_BYTES


class DecodeGraphs:
    """The graphs of a model: by size, and by the context that their block tables hold.

    All are captured when the engine starts, the largest first, whose memory the others then share. Captured on demand
    they would delay requests, and need memory that the KV cache has.
    """

    def __init__(
        self,
        model: Decoder,
        attention: GraphAttention,
        caches: Sequence[Tensor],
        recorder: Recorder,
        *,
        spare_block: int,
        max_tokens: int,
        max_context: int,
        num_seats: int,
    ) -> None:
        """``spare_block`` of the ``caches`` is no sequence's. ``max_context``: tokens of the longest sequence."""
        self._model, self._attention, self._caches = model, attention, caches
        self.sizes = graph_sizes(max_tokens)
        self.contexts = {size: attention.decode_contexts(max_context, rows=size) for size in self.sizes}
        self.num_replays = 0
        shapes = graph_shapes(attention, max_tokens, max_context)
        device, width = model.embed_tokens.device, -(-shapes[0][1] // attention.block_size)
        self._idle_row = np.array([0, 0, 1, num_seats])  # padding: a first token in the spare block
        self._written = [0] * num_seats  # cells of each seat's row beyond which all are the spare block
        with torch.inference_mode():
            # One for all graphs: each would keep its own in the pool for ever.
            self._logits = model.embed_tokens.new_empty(self.sizes[-1], model.config.vocab_size)
            inputs = move(torch.from_numpy(np.tile(self._idle_row, (self.sizes[-1], 1))), device)
            self._inputs = {size: inputs[:size] for size in self.sizes}
            self._tables = torch.full((num_seats + 1, width), spare_block, dtype=torch.int32, device=device)
            self._graphs = {(size, context): self._record(recorder, size, context) for size, context in shapes}

    def _record(self, recorder: Recorder, size: int, context: int) -> Compute:
        inputs, tables = self._inputs[size], self._tables[:, : -(-context // self._attention.block_size)]
        logits = self._logits[:size]
        caches, model, attention = self._caches, self._model, self._attention
        return recorder(lambda: logits.copy_(compute_rows(model, attention, caches, inputs, tables)))

    def load(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int] | None,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        seats: Sequence[int],
        tables: BlockTables,
        ahead: TokensAhead | None = None,
    ) -> Replay | None:
        """Send the step's T tokens to the smallest graph that holds them; None where none does.

        Those that are ``ahead`` are written over their places of ``token_ids``.

        In the graph every token is a row of its own, whose context ends with it: each layer writes the keys and values
        of all tokens before any of them attends. The result computes the logits of the ``wanted`` tokens
        [len(wanted), vocab], of all where it is None. ``query_lens``, ``context_lens`` and
        ``seats``, those of the rows in ``tables``, have an entry a row.
        """
        count = len(token_ids)
        size = _first_from(self.sizes, count)
        if size is None or max(query_lens) > _MAX_ROW_TOKENS:
            return None
        context = _first_from(self.contexts[size], max(context_lens))
        if context is None:
            return None
        self._send_changes(tables)
        host = torch.empty(size, _NUM_COLUMNS, dtype=torch.int64, pin_memory=self._logits.is_cuda)
        rows = host.numpy()
        rows[:count, 0] = token_ids
        rows[:count, 1] = positions
        if count == len(seats):
            rows[:count, 2] = context_lens
            rows[:count, 3] = seats
        else:
            lengths = np.array(query_lens)
            rows[:count, 2] = np.arange(1, count + 1) + np.repeat(context_lens - lengths.cumsum(), lengths)
            rows[:count, 3] = np.repeat(seats, lengths)
        if count < size:
            rows[count:] = self._idle_row
        inputs = self._inputs[size].copy_(host, non_blocking=True)
        if ahead is not None:
            ahead.write_to(inputs[:, 0])
        chosen = None if wanted is None else to_device(wanted, self._logits.device, torch.int64)
        return partial(self._replay, self._graphs[size, context], count, chosen)

    def _send_changes(self, tables: BlockTables) -> None:
        """Bring the block tables on the device up to date."""
        if not tables.changed:
            return
        width = self._tables.shape[1]
        places, blocks = [], []
        for seat, first in tables.changed.items():
            length = min(tables.lengths[seat], width)
            end = max(length, self._written[seat])
            self._written[seat] = length
            places.append(np.arange(seat * width + first, seat * width + max(first, end)))
            blocks.append(tables.rows[seat, first:end])
        tables.changed.clear()
        where, values = together([np.concatenate(places), np.concatenate(blocks)], self._tables.device)
        self._tables.view(-1).index_copy_(0, where, values.int())

    def _replay(self, replay: Compute, count: int, wanted: Tensor | None) -> Tensor:
        replay()
        self.num_replays += 1
        return self._logits[:count] if wanted is None else self._logits.index_select(0, wanted)


def compute_rows(
    model: Decoder, attention: GraphAttention, caches: Sequence[Tensor], inputs: Tensor, tables: Tensor
) -> Tensor:
    """The logits [n, vocab] of rows of one token each: int64 ``inputs`` [n, token, position, context, seat].

    ``tables``: the blocks of each seat, int32 [seats, width].
    """
    token_ids, positions, context_lens, seats = inputs.unbind(1)
    metadata = attention.decode_metadata(context_lens, tables.index_select(0, seats))
    return model.logits(model(model.embed(token_ids), positions, caches, attention, metadata))


def _first_from(values: Sequence[int], least: int) -> int | None:
    """The first of ascending ``values`` that is not below ``least``."""
    index = bisect_left(values, least)
    return values[index] if index < len(values) else None
