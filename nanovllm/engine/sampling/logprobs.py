"""Log probabilities of tokens, of the model's own logits: before temperature, penalties, biases, constraints."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from nanovllm.engine.outputs import Logprob, TokenLogprobs

SCORE_CHUNK_TOKENS = 256
"""Tokens of a prompt whose logits are in memory together."""


def top_logprobs(
    logits: Tensor, taken: Sequence[int], counts: Sequence[int], text_of: Callable[[int], str]
) -> list[TokenLogprobs]:
    """For each row of ``logits`` [rows, vocab] the token ``taken`` there and the ``counts`` most probable ones.

    A rank of 1 is the most probable token; equal logits share a rank.
    """
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, logprobs.new_tensor(taken).long().unsqueeze(1))
    ranks: list[int] = ((logprobs > own).sum(1) + 1).tolist()
    best = logprobs.topk(min(max(counts), logprobs.shape[1]), dim=1)
    table = zip(taken, own[:, 0].tolist(), ranks, counts, best.values.tolist(), best.indices.tolist(), strict=True)
    rows = []
    for token, logprob, own_rank, count, values, indices in table:
        row = {token: Logprob(logprob, own_rank, text_of(token))}
        for rank, (value, index) in enumerate(zip(values[:count], indices[:count], strict=True), 1):
            row.setdefault(index, Logprob(value, rank, text_of(index)))
        rows.append(row)
    return rows
