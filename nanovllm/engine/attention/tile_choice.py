"""The query vectors of a row from which on attention in bfloat16 multiplies by AMX tiles: measured, and recorded.

The record is that of `layers.product_choice`. Tiles have other bits than vectors, so with ``deterministic=True`` they
serve all rows wherever the process has them, or none: a token's bits must not depend on the chunk that it came in.
"""

from __future__ import annotations

import torch

from nanovllm.engine.kernels import tiles
from nanovllm.engine.layers import product_choice

_CONTEXT, _BLOCK, _DIM = 1024, 16, 128


def tiles_from(dtype: torch.dtype, *, deterministic: bool = False) -> int | None:
    """The query vectors for one key head from which on a row attends by tiles; None: never."""
    if dtype != torch.bfloat16 or tiles.why_not() is not None:
        return None
    return 1 if deterministic else product_choice.recorded("attention", measure).tiles_from


@torch.inference_mode()
def measure() -> product_choice.Microseconds:
    """Microseconds of one token's attention to a thousand positions by query heads that share a key head."""
    cache = torch.zeros(_CONTEXT // _BLOCK, 2, 1, _BLOCK, _DIM, dtype=torch.bfloat16)
    table = torch.arange(len(cache), dtype=torch.int32).view(1, -1)
    slots, starts, contexts, seats = (torch.tensor(each) for each in ([_CONTEXT - 1], [0, 1], [_CONTEXT], [0]))
    limits = {"vectors": None, "tiles": 1}

    def attend(kind: str, queries: int) -> None:
        query = torch.ones(1, queries, _DIM, dtype=torch.bfloat16)
        key = query[:, :1].contiguous()
        torch.ops.nanovllm.paged_attention(
            query, key, key, cache, _BLOCK, slots, starts, contexts, table, seats, _DIM**-0.5, limits[kind]
        )

    return product_choice.by_turns(list(limits), attend)
