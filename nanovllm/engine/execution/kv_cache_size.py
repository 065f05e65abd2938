"""The size of the KV cache: a share of the device's memory, less weights, activations and other reserves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nanovllm.engine.attention.base import AttentionBackend, AttentionBatch, GraphAttention
from nanovllm.engine.attention.sdpa import SdpaAttention
from nanovllm.engine.config import LEAST_KV_BYTES, EngineConfig
from nanovllm.engine.execution.cuda_graphs import compute_rows, graph_bytes, graph_shapes
from nanovllm.engine.execution.host_memory import memory_limit, resident_bytes, shared_bytes
from nanovllm.engine.models.decoder import Decoder
from nanovllm.engine.models.text_model import TextModel
from nanovllm.engine.sampling.kernel_selection import SamplingKernels
from nanovllm.engine.sampling.logprobs import SCORE_CHUNK_TOKENS, top_logprobs
from nanovllm.engine.sampling.sampling_batch import RandomRows
from nanovllm.engine.step_limits import Device, ModelCosts, StepLimits, choose_step_limits
from nanovllm.errors import ConfigurationError
from nanovllm.vision.encoders.base import ImageEncoder

_LIBRARY_BYTES = 128 << 20
"""What libraries take later: a workspace of cuBLAS, 32 MiB on Hopper, for the engine's thread and for the stream that
records graphs, and kernels that are loaded when they are first needed."""


def limits_for(
    config: EngineConfig,
    device: torch.device,
    model: TextModel,
    attention: AttentionBackend,
    sampling: SamplingKernels,
    *,
    reserved: int,
) -> StepLimits:
    """The limits of a step on ``device``, where the weights are already; ``reserved`` as for :func:`kv_cache_bytes`."""
    itemsize = model.embed_tokens.dtype.itemsize
    costs = ModelCosts(
        kv_token=sum(2 * heads * width * itemsize for heads, width in model.config.kv_shapes),
        hidden_row=model.config.hidden_size * itemsize,
        vocab_size=model.config.vocab_size,
        itemsize=itemsize,
        context=model.config.context_limit(config.max_model_len),
        copies_pages=isinstance(attention, SdpaAttention),
        sorts_logits=sampling.reason is not None,
    )
    if device.type != "cuda":
        return choose_step_limits(config, Device(device.type), 0, costs)
    properties = torch.cuda.get_device_properties(device)
    gpu = Device(device.type, properties.total_memory, (properties.major, properties.minor))
    return choose_step_limits(config, gpu, _room(config, device, reserved), costs)


def kv_cache_bytes(
    config: EngineConfig,
    limits: StepLimits,
    device: torch.device,
    model: TextModel,
    attention: AttentionBackend,
    sampling: SamplingKernels,
    encoder: ImageEncoder | None = None,
    *,
    has_graphs: bool,
    reserved: int,
) -> int:
    """The configured bytes; else what ``cpu_memory_utilization`` or ``gpu_memory_utilization`` leaves.

    Weights are loaded already. ``draw`` is how tokens are drawn; ``has_graphs``: steps are to be recorded;
    ``reserved``: bytes that are allocated later, for the embedding cache. Raises ConfigurationError where a step or the
    encoder's largest pass does not fit the GPU.
    """
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    if device.type != "cuda":
        shared = shared_bytes()
        own = (int(memory_limit() * config.cpu_memory_utilization) - shared) // config.cpu_memory_shares
        return max(LEAST_KV_BYTES, own - (resident_bytes() - shared) - reserved)
    context = model.config.context_limit(config.max_model_len)
    with _naming(
        f"a step of max_num_batched_tokens={limits.max_num_batched_tokens} at the end of a context of {context} "
        f"tokens, or sampling for max_num_seqs={limits.max_num_seqs}, does not fit the GPU: lower one of them"
    ):
        peaks = [peak_bytes(device, lambda: largest_step(config, limits, model, attention, sampling))]
    if encoder is not None:
        with _naming(
            "the largest images that the encoder takes do not fit the GPU: lower max_pixels, max_image_tokens or "
            "max_image_size, or set enable_multimodal=False"
        ):
            peaks.append(peak_bytes(device, lambda: encoder.embed_largest(context)))
    kept = _LIBRARY_BYTES + reserved
    if has_graphs and isinstance(attention, GraphAttention) and isinstance(model, Decoder):
        shapes = graph_shapes(attention, limits.decode_tokens(config.num_speculative_tokens), context)
        with _naming(
            f"a recorded step of {shapes[0][0]} tokens does not fit the GPU: lower max_num_seqs="
            f"{limits.max_num_seqs}, or set enforce_eager=True"
        ):
            peaks.append(peak_bytes(device, lambda: largest_graph_step(model, attention, *shapes[0])))
        # The graphs' pool is apart from what other steps use; each graph is warmed up outside of it, beside those that
        # are recorded already.
        kept += peaks[-1] + graph_bytes(model, attention, shapes, limits.max_num_seqs)
    return max(0, _room(config, device, kept) - max(peaks))


def _room(config: EngineConfig, device: torch.device, reserved: int) -> int:
    """Bytes that ``gpu_memory_utilization`` leaves beside what is in the GPU's memory, by others too."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return max(0, free - reserved - int(total * (1.0 - config.gpu_memory_utilization)))


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """ConfigurationError with ``what`` in place of a GPU's OutOfMemoryError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ConfigurationError(what) from None


def peak_bytes(device: torch.device, compute: Callable[[], object]) -> int:
    """Bytes that ``compute`` makes torch take from the device at its peak; none of it stays.

    What torch takes is more than its tensors have: the rest is lost between them, as it is when requests run.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    compute()
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    return peak - before


@torch.inference_mode()
def largest_step(
    config: EngineConfig,
    limits: StepLimits,
    model: TextModel,
    attention: AttentionBackend,
    sampling: SamplingKernels,
) -> Tensor:
    """Compute as much as any step: the last tokens of a longest prompt, random tokens of all rows, and logprobs."""
    context = model.config.context_limit(config.max_model_len)
    device = model.embed_tokens.device
    length = min(limits.max_num_batched_tokens, context)
    caches = _one_block_for_all(model, attention)
    metadata = attention.metadata(AttentionBatch([length], [context], [[0] * -(-context // attention.block_size)]))
    ids = torch.zeros(length, dtype=torch.int64, device=device)
    positions = torch.arange(length, device=device)
    if model.config.position_axes is not None:
        positions = positions.unsqueeze(1).expand(-1, model.config.num_axes)
    hidden = model(model.embed(ids), positions, caches, attention, metadata)
    rows = limits.decode_tokens(config.num_speculative_tokens)
    logits = model.logits(hidden[:1].expand(rows, -1).contiguous())
    # For logprobs of what is sampled, and those of the step before, which may not be read yet.
    unchanged, _earlier = logits.clone(), logits.clone()
    tokens = sampling.draw_tokens(logits, _limited_rows(rows, model))
    scored = min(len(hidden), SCORE_CHUNK_TOKENS)
    top_logprobs(model.logits(hidden[:scored]), [0] * scored, [1] * scored, str)
    top_logprobs(unchanged, [0] * rows, [1] * rows, str)
    return tokens


def _limited_rows(rows: int, model: TextModel) -> RandomRows:
    """Rows with all limits on what they may draw, which takes most memory."""
    device = model.embed_tokens.device
    limits = torch.tensor([[1.0, 0.01, 0.9]], device=device).expand(rows, -1).contiguous()
    keys = torch.tensor([[0, 0, model.config.vocab_size - 1]], device=device).expand(rows, -1).contiguous()
    return RandomRows(torch.arange(rows, device=device), limits, keys)


@torch.inference_mode()
def largest_graph_step(model: Decoder, attention: GraphAttention, size: int, context: int) -> Tensor:
    """Compute as much as the recorded step of ``size`` tokens and contexts of up to ``context``."""
    device = model.embed_tokens.device
    inputs = torch.tensor([[0, 0, context, 0]] * size, device=device)
    tables = torch.zeros(1, -(-context // attention.block_size), dtype=torch.int32, device=device)
    return compute_rows(model, attention, _one_block_for_all(model, attention), inputs, tables)


def _one_block_for_all(model: TextModel, attention: AttentionBackend) -> list[Tensor]:
    """A cache of one block that all layers of a shape and all pages of a table share: the results are not read."""
    shapes = model.config.kv_shapes
    caches = {shape: attention.allocate(1, *shape, model.embed_tokens.dtype) for shape in set(shapes)}
    return [caches[shape] for shape in shapes]
