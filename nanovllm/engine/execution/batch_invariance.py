"""``deterministic=True``: the bits of a request's logits do not depend on what is computed beside it, or when.

A product's last bits depend on how many rows are multiplied at once, because libraries choose their blocking by it. So
products of a library are computed in tiles of one constant height (`linear.Linear.choose_layout`), images are encoded
one by one, and the rest of a layer, attention included, runs in kernels that compute each token by itself. No library
guarantees this: the loaded model is tested at start, and the mode refused where the bits differ.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from nanovllm.engine import kernels
from nanovllm.engine.attention.base import AttentionBackend, AttentionBatch
from nanovllm.engine.attention.cpu_paged import PagedCpuAttention
from nanovllm.engine.models.decoder import Decoder
from nanovllm.errors import ConfigurationError

TILE = 16  # rows; one row costs a CPU about as much as these, because the weight has to be read for either

_LENGTH = 2 * TILE + 5  # tokens of the trial
_CHUNKS = ([1] * 5 + [TILE] * 2, [7, 11, TILE + 3], [_LENGTH])


@torch.inference_mode()
def prove(model: Decoder, attention: AttentionBackend) -> None:
    """Compute one sequence in several chunkings and positions of a batch.

    Raises ConfigurationError where its logits differ in a bit, or the kernels that the mode rests on are missing.
    """
    if not isinstance(attention, PagedCpuAttention):
        reason = kernels.missing() if model.embed_tokens.is_cpu else "the device is no CPU"
        raise ConfigurationError(
            f"deterministic=True needs our kernels for CPUs, which cannot be used: {reason}. Leave deterministic out"
        )
    expected = None
    for chunks, neighbours in itertools.product(_CHUNKS, ((), (1,), (TILE + 2, 3))):
        logits = _logits(model, attention, chunks, neighbours)
        if expected is None:
            expected = logits
        elif not torch.equal(logits, expected):
            raise ConfigurationError(
                "deterministic=True is not possible with this checkpoint on this machine: computed in chunks of "
                f"{chunks} beside rows of {list(neighbours)} tokens, its logits differ by up to "
                f"{float((logits - expected).abs().max()):.2g}"
            )


def _logits(model: Decoder, attention: AttentionBackend, chunks: list[int], neighbours: tuple[int, ...]) -> Tensor:
    """Logits [_LENGTH, vocab] of one sequence that is computed chunk by chunk, each between rows of other sequences."""
    config = model.config
    dtype = model.embed_tokens.dtype
    tokens = torch.arange(1, _LENGTH + 1) * 7919 % config.vocab_size
    blocks = -(-_LENGTH // attention.block_size)
    caches = [
        attention.allocate((1 + len(neighbours)) * blocks, config.num_key_value_heads, config.head_dim, dtype)
        for _ in range(config.num_hidden_layers)
    ]
    tables = [list(range(first, first + blocks)) for first in range(0, (1 + len(neighbours)) * blocks, blocks)]
    found = []
    for end, chunk in zip(itertools.accumulate(chunks), chunks, strict=True):
        # Single tokens first, as in every step; where ours comes among the others depends on its chunk.
        rows = sorted([(chunk, end, 0), *((n, n, one) for one, n in enumerate(neighbours, 1))])
        lengths, ends, which = zip(*rows, strict=True)
        batch = AttentionBatch(lengths, ends, [tables[one] for one in which])
        ids = torch.cat([tokens[end - n : end] if one == 0 else tokens[:n].flip(0) for n, end, one in rows])
        positions = torch.cat([torch.arange(end - n, end) for n, end, _ in rows])
        hidden = model(model.embed(ids), positions, caches, attention, attention.metadata(batch))
        found.append(model.logits(hidden.split(lengths)[which.index(0)]))
    return torch.cat(found)
