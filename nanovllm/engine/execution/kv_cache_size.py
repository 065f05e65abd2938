"""The size of the KV cache: a share of the device's memory, less weights, activations and other reserves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nanovllm.engine.attention.base import AttentionBackend, AttentionBatch, GraphAttention
from nanovllm.engine.config import LEAST_KV_BYTES, EngineConfig
from nanovllm.engine.execution.cuda_graphs import compute_rows, graph_sizes
from nanovllm.engine.execution.host_memory import memory_limit, resident_bytes
from nanovllm.engine.models.decoder import Decoder
from nanovllm.engine.models.text_model import TextModel
from nanovllm.errors import ConfigurationError


def kv_cache_bytes(
    config: EngineConfig,
    device: torch.device,
    model: TextModel,
    attention: AttentionBackend,
    *,
    has_graphs: bool,
    reserved: int,
) -> int:
    """The configured bytes; else what ``cpu_memory_utilization`` or ``gpu_memory_utilization`` leaves.

    Weights are loaded already. ``has_graphs``: steps are to be recorded; ``reserved``: bytes that are allocated later,
    for the embedding cache. Raises ConfigurationError where the largest step alone does not fit the GPU.
    """
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    if device.type != "cuda":
        share = int(memory_limit() * config.cpu_memory_utilization)
        return max(LEAST_KV_BYTES, share - resident_bytes() - reserved)
    try:
        peak = peak_bytes(device, lambda: largest_step(config, model, attention))
        if has_graphs and isinstance(attention, GraphAttention) and isinstance(model, Decoder):
            # Their pool is apart from what other steps use.
            peak += peak_bytes(device, lambda: largest_graph_step(config, model, attention))
    except torch.OutOfMemoryError:
        raise ConfigurationError(
            f"a step of max_num_batched_tokens={config.step_tokens(device.type)} at the end of a context of "
            f"{model.config.context_limit(config.max_model_len)} tokens does not fit the GPU: lower either"
        ) from None
    free, total = torch.cuda.mem_get_info(device)
    return max(0, free - peak - reserved - int(total * (1.0 - config.gpu_memory_utilization)))


def peak_bytes(device: torch.device, compute: Callable[[], object]) -> int:
    """Peak memory of ``compute`` in bytes; none of it stays reserved."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    compute()
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    return peak - before


@torch.inference_mode()
def largest_step(config: EngineConfig, model: TextModel, attention: AttentionBackend) -> Tensor:
    """Compute as much as any step: the last tokens of a longest prompt, and the logits that all seats would sample."""
    limit = model.config.context_limit(config.max_model_len)
    device = model.embed_tokens.device
    length = min(config.step_tokens(device.type), limit)
    caches = _one_block_for_all(model, attention)
    metadata = attention.metadata(AttentionBatch([length], [limit], [[0] * -(-limit // attention.block_size)]))
    ids = torch.zeros(length, dtype=torch.int64, device=device)
    positions = torch.arange(length, device=device)
    if model.config.position_axes is not None:
        positions = positions.unsqueeze(1).expand(-1, model.config.num_axes)
    hidden = model(model.embed(ids), positions, caches, attention, metadata)
    logits = model.logits(hidden[: config.max_num_seqs])
    # Sampling with top_p keeps this many copies.
    return logits.float().softmax(-1).sort(-1, descending=True).values.cumsum(-1)


@torch.inference_mode()
def largest_graph_step(config: EngineConfig, model: Decoder, attention: GraphAttention) -> Tensor:
    """Compute as much as the largest recorded step."""
    limit = model.config.context_limit(config.max_model_len)
    context = attention.decode_contexts(limit)[-1]
    device = model.embed_tokens.device
    inputs = torch.tensor([[0, 0, context, 0]] * graph_sizes(config.max_decode_tokens)[-1], device=device)
    tables = torch.zeros(1, -(-context // attention.block_size), dtype=torch.int32, device=device)
    return compute_rows(model, attention, _one_block_for_all(model, attention), inputs, tables)


def _one_block_for_all(model: TextModel, attention: AttentionBackend) -> list[Tensor]:
    """A cache of one block that all layers of a shape and all pages of a table share: the results are not read."""
    shapes = model.config.kv_shapes
    caches = {shape: attention.allocate(1, *shape, model.embed_tokens.dtype) for shape in set(shapes)}
    return [caches[shape] for shape in shapes]
