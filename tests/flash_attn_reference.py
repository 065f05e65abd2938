"""flash-attn's call in plain torch, as strict about arguments as the real one, to run the CUDA backend on a CPU.

Put it in ``sys.modules["flash_attn"]``. Semantics after flash-attn 2.8: causal masks are aligned at the last token, a
paged cache has pages of a multiple of 256 tokens, and lengths and tables are int32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """q [total, heads, d], pages k and v [blocks, block_size, kv_heads, d], block_table [rows, width] → like q."""
    assert causal, "a decoder's attention is causal"
    assert block_table is not None, "keys and values lie in pages"
    for lengths in (cu_seqlens_q, cu_seqlens_k, block_table):
        assert lengths.dtype == torch.int32
        assert lengths.is_contiguous()
        assert lengths.device == q.device
    rows = len(cu_seqlens_q) - 1
    assert cu_seqlens_k.shape == cu_seqlens_q.shape == (rows + 1,)
    assert block_table.shape[0] == rows
    assert k.shape == v.shape
    assert k.shape[1] % 256 == 0, "flash-attn takes pages of a multiple of 256 tokens"
    assert q.shape[1] % k.shape[2] == 0
    assert q.shape[2] == k.shape[3] <= 256
    assert q.shape[2] % 8 == 0
    for tensor in (q, k, v):
        assert tensor.stride(-1) == 1
    assert int(cu_seqlens_q[-1]) == len(q)
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    assert int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    outputs = []
    for row in range(rows):
        query = q[cu_seqlens_q[row] : cu_seqlens_q[row + 1]]
        context = int(cu_seqlens_k[row + 1] - cu_seqlens_k[row])
        assert context >= len(query) > 0
        pages = block_table[row, : -(-context // k.shape[1])].long()
        assert int(pages.min()) >= 0
        assert int(pages.max()) < len(k)
        keys, values = (cache[pages].flatten(0, 1)[:context] for cache in (k, v))
        mask = torch.ones(len(query), context, dtype=torch.bool, device=q.device).tril(context - len(query))
        output = F.scaled_dot_product_attention(
            *(part.transpose(0, 1)[None] for part in (query, keys, values)),
            attn_mask=mask,
            scale=softmax_scale,
            enable_gqa=True,
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)
