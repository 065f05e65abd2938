"""The tokens of a step, and the log probabilities of those requests that ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from nanovllm.engine.layers.device_copy import to_device
from nanovllm.engine.outputs import TokenLogprobs
from nanovllm.engine.sampling.logprobs import top_logprobs
from nanovllm.engine.sampling.sampler import Sampler
from nanovllm.engine.scheduling import sequence as scheduling


@dataclass(frozen=True)
class SampledTokens:
    """The tokens that a step sampled, one for each row of logits, and their log probabilities where asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


def sample_tokens(
    sampler: Sampler,
    logits: Tensor,
    sequences: Sequence[scheduling.Sequence],
    masks: Callable[[], Tensor] | None,
    text_of: Callable[[int], str],
) -> SampledTokens:
    """The next token of each of ``sequences`` from its row of ``logits``, which are overwritten.

    ``masks`` gives those of `structured_output.TokenMasks`, ``text_of`` the text of a token.
    """
    scored = [index for index, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]
    unchanged = logits.index_select(0, to_device(scored, logits.device)) if scored else None
    tokens = sampler.sample(logits, sequences, masks() if masks is not None else None)
    logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
    if unchanged is not None:
        counts = [sequences[index].sampling.logprobs or 0 for index in scored]
        scores = top_logprobs(unchanged, [tokens[index] for index in scored], counts, text_of)
        for index, score in zip(scored, scores, strict=True):
            logprobs[index] = score
    return SampledTokens(tokens, logprobs)
