"""Log probabilities of tokens, of the model's own logits: before temperature, penalties, biases, constraints."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanovllm.engine.layers.device_copy import to_device
from nanovllm.engine.outputs import Logprob, TokenLogprobs

SCORE_CHUNK_TOKENS = 256
"""Tokens of a prompt whose logits are in memory together."""


def top_logprobs(
    logits: Tensor, taken: Sequence[int], counts: Sequence[int], text_of: Callable[[int], str]
) -> list[TokenLogprobs]:
    """For each row of ``logits`` [rows, vocab] the token ``taken`` there and the ``counts`` most probable ones."""
    scores = score_tokens(logits, to_device(taken, logits.device, torch.int64), max(counts))
    return read_scores(scores, taken, counts, text_of)


def score_tokens(logits: Tensor, taken: Tensor, count: int) -> tuple[Tensor, ...]:
    """Of each row of ``logits`` [rows, vocab] the scores of the token ``taken`` [rows] and of the ``count`` best ones.

    Log probability and rank of the one, [rows] each, log probabilities and tokens of the others, [rows, count] each. A
    rank of 1 is the most probable token; equal logits share a rank.
    """
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, taken.unsqueeze(1))
    best = logprobs.topk(min(count, logprobs.shape[1]), dim=1)
    return own[:, 0], (logprobs > own).sum(1) + 1, best.values, best.indices


def read_scores(
    scores: Sequence[Tensor], taken: Sequence[int], counts: Sequence[int], text_of: Callable[[int], str]
) -> list[TokenLogprobs]:
    """The rows of what `score_tokens` computed, each cut to its own of ``counts``."""
    own, ranks, best, tokens = (values.tolist() for values in scores)
    table = zip(taken, own, ranks, counts, best, tokens, strict=True)
    rows = []
    for token, logprob, own_rank, count, values, indices in table:
        row = {token: Logprob(logprob, own_rank, text_of(token))}
        for rank, (value, index) in enumerate(zip(values[:count], indices[:count], strict=True), 1):
            row.setdefault(index, Logprob(value, rank, text_of(index)))
        rows.append(row)
    return rows
