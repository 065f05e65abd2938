"""Which attention an engine gets: the first of a list that is there and computes what plain torch does.

That a package can be found proves little: it may be another one of the same name, built against another torch, or have
no kernel for this GPU, and some have given wrong numbers for a few shapes. So each is tried, with the model's heads.
"""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from nanovllm.engine import kernels
from nanovllm.engine.attention.base import AttentionBackend, AttentionBatch, GraphAttention, padded_tables
from nanovllm.engine.attention.cpu_paged import PagedCpuAttention
from nanovllm.engine.attention.sdpa import SdpaAttention
from nanovllm.engine.attention.tile_choice import tiles_from
from nanovllm.errors import ConfigurationError

logger = logging.getLogger(__name__)

TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of :func:`trial`. Rounding costs a third of it at most; what belongs to another row costs a hundred times as much."""
_HALVES = (torch.float16, torch.bfloat16)
# Contexts that end in their first page and on either side of a page's end, and some long enough to be cut into shares.
ROWS = ((1, 0), (1, 4), (1, 15), (1, 16), (1, 255), (1, 256), (1, 700), (3, 0), (3, 300), (17, 0), (17, 30), (17, 600))


class _NotThere(Exception):
    """A backend that this machine has not got, which is nothing to warn of."""


@dataclass(frozen=True)
class Heads:
    """A model's heads of queries, of keys and values, and their size."""

    num: int
    num_kv: int
    dim: int


_SOME_HEADS = Heads(4, 2, 64)


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    block_size: int | None = None,
    heads: Heads = _SOME_HEADS,
    deterministic: bool = False,
) -> AttentionBackend:
    """The best backend that is there and passes its trial; ConfigurationError if it has no pages of ``block_size``.

    ``deterministic``: a token's bits may not depend on how its prompt is cut into chunks.
    """
    if device.type == "cpu":
        reason = kernels.missing()
        if reason is None:
            return PagedCpuAttention(block_size, tiles_from=tiles_from(dtype, deterministic=deterministic))
        logger.warning("attention copies its pages, because our kernels for CPUs cannot be used: %s", reason)
        return SdpaAttention(device, dtype, block_size, reason=reason)
    if device.type != "cuda":
        return SdpaAttention(device, dtype, block_size, reason=f"the others are for CPUs and CUDA, not {device.type}")
    # From torch 2.11 on, scaled_dot_product_attention prefers cuDNN on sm_90, which builds a metadata for every shape
    # that it has not seen, and here nearly every step has a new one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    backend, reasons = first_right(CANDIDATES, device, dtype, block_size, heads)
    return backend or SdpaAttention(device, dtype, block_size, reason="; ".join(reasons))


Make = Callable[[torch.device, torch.dtype, int | None], AttentionBackend]
"""Takes the model's device and type, and tokens of a block; may raise anything."""


def first_right(
    candidates: Mapping[str, Make], device: torch.device, dtype: torch.dtype, block_size: int | None, heads: Heads
) -> tuple[AttentionBackend | None, list[str]]:
    """The first backend that is there and right, and what is wrong with those before it."""
    reasons = []
    for name, make in candidates.items():
        try:
            backend = make(device, dtype, block_size)
            error = trial(backend, device, dtype, heads)
        except _NotThere as absence:
            reasons.append(f"{name}: {absence}")
            continue
        except ConfigurationError:
            raise
        except Exception as failure:  # a foreign kernel may raise whatever it likes
            reason = f"{type(failure).__name__}: {failure}"
        else:
            if error <= TOLERANCES[dtype]:
                return backend, reasons
            reason = f"its numbers are off by {error:.2g}"
        logger.warning("attention does without %s: %s", name, reason)
        reasons.append(f"{name}: {reason}")
    return None, reasons


def _flash_attn(device: torch.device, dtype: torch.dtype, block_size: int | None) -> AttentionBackend:
    if dtype not in _HALVES:
        raise _NotThere(f"not for {dtype}")
    from nanovllm.engine.attention.varlen import PagedVarlenAttention, flash_attn_kernels

    try:
        kernel = flash_attn_kernels()
    except ModuleNotFoundError as error:
        if error.name != "flash_attn":
            raise
        raise _NotThere("not installed") from None
    if block_size is not None and block_size % 256:
        raise ConfigurationError(
            f"block_size={block_size}: flash-attn, which is installed, reads pages of a multiple of 256 tokens: leave "
            "block_size out, or make it 256"
        )
    return PagedVarlenAttention(device, kernel, block_size, name="flash-attn on the pages")


def _triton(device: torch.device, dtype: torch.dtype, block_size: int | None) -> AttentionBackend:
    try:
        from nanovllm.engine.attention.triton_paged import TritonAttention
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise _NotThere("not installed") from None
    return TritonAttention(device, block_size)


def _varlen_attn(device: torch.device, dtype: torch.dtype, block_size: int | None) -> AttentionBackend:
    if dtype not in _HALVES:
        raise _NotThere(f"not for {dtype}")
    from nanovllm.engine.attention.varlen import PagedVarlenAttention, torch_varlen_kernel

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ModuleNotFoundError:
        raise _NotThere("this torch has none") from None
    if "block_table" not in inspect.signature(varlen_attn).parameters:
        raise _NotThere("this torch's takes no block tables")
    return PagedVarlenAttention(device, torch_varlen_kernel(), block_size, name="torch varlen_attn on the pages")


CANDIDATES: dict[str, Make] = {
    "flash-attn": _flash_attn,
    "Triton": _triton,
    "torch varlen_attn": _varlen_attn,
}
"""For CUDA, the best first."""


@torch.inference_mode()
def trial(
    backend: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    heads: Heads = _SOME_HEADS,
    rows: Sequence[tuple[int, int]] = ROWS,
) -> float:
    """How far off plain torch in float64 ``backend`` is at worst, of a value or of 1 where that is more; maybe NaN.

    ``rows``: how many tokens each has, and how many its sequence has before. There are three steps: those before, the
    rows, and one more token of each sequence, planned on the device if the backend can do that.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads: int, tokens: int) -> Tensor:
        return torch.randn(tokens, num_heads, heads.dim, generator=generator).to(dtype).to(device)

    lengths, befores = zip(*rows, strict=True)
    ends = [length + before for length, before in rows]
    keys, values = ([draw(heads.num_kv, end + 1) for end in ends] for _ in range(2))
    blocks = [-(-(end + 1) // backend.block_size) for end in ends]
    pages = random.Random(0).sample(range(sum(blocks)), sum(blocks))
    tables = [pages[end - count : end] for count, end in zip(blocks, accumulate(blocks), strict=True)]
    cache = backend.allocate(len(pages), heads.num_kv, heads.dim, dtype)
    errors = []
    for counts, stops in ((befores, befores), (lengths, ends), ([1] * len(ends), [end + 1 for end in ends])):
        # Rows of one token come first, as in every step.
        order = sorted((one for one in range(len(rows)) if counts[one]), key=lambda one: (counts[one] > 1, stops[one]))
        lengths_now = [counts[one] for one in order]
        batch = AttentionBatch(lengths_now, [stops[one] for one in order], [tables[one] for one in order])
        query = draw(heads.num, sum(batch.query_lens))
        key, value = (
            torch.cat([whole[one][stops[one] - counts[one] : stops[one]] for one in order]) for whole in (keys, values)
        )
        if max(batch.query_lens) == 1 and isinstance(backend, GraphAttention):
            padded = torch.from_numpy(padded_tables(batch, backend.block_size)).to(device)
            metadata = backend.decode_metadata(torch.tensor(batch.context_lens, device=device), padded)
        else:
            metadata = backend.metadata(batch)
        output = backend.attend(query, key, value, cache, metadata)
        expected = torch.cat(
            [
                _attention(part, keys[one][: stops[one]], values[one][: stops[one]])
                for one, part in zip(order, query.split(lengths_now), strict=True)
            ]
        )
        errors.append(((output.double() - expected).abs() / expected.abs().clamp_min(1.0)).amax())
    return float(torch.stack(errors).amax())  # which keeps a NaN


def _attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last queries [n, heads, d] of a context [m, kv_heads, d], by the definition and in float64."""
    grouped = query.double().unflatten(1, (keys.shape[1], -1))
    scores = torch.einsum("nkgd,mkd->kgnm", grouped, keys.double()) * query.shape[-1] ** -0.5
    visible = torch.ones(len(query), len(keys), dtype=torch.bool, device=query.device).tril(len(keys) - len(query))
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("kgnm,mkd->nkgd", weights, values.double()).flatten(1, 2)
