"""Log probabilities of a prompt's tokens, from the hidden states of its rows."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nanovllm.engine.models.text_model import TextModel
from nanovllm.engine.outputs import TokenLogprobs
from nanovllm.engine.sampling.logprobs import SCORE_CHUNK_TOKENS, top_logprobs
from nanovllm.engine.scheduling.batch import ScheduledRow


def score_prompt(
    model: TextModel, row: ScheduledRow, hidden: Tensor, text_of: Callable[[int], str]
) -> list[TokenLogprobs]:
    """The log probabilities of the prompt tokens after the row's positions; hidden is [row tokens, width]."""
    sequence = row.sequence
    count = sequence.sampling.prompt_logprobs or 0
    # The first token has none, because no logits come before it.
    found: list[TokenLogprobs] = [] if sequence.prompt_logprobs else [{}]
    # Positions before these were scored before a preemption.
    first = max(row.start, len(sequence.prompt_logprobs) - 1)
    images = {span.start + place for span in sequence.images for place in span.places}
    for start in range(first, min(row.end, sequence.num_prompt_tokens - 1), SCORE_CHUNK_TOKENS):
        end = min(start + SCORE_CHUNK_TOKENS, row.end, sequence.num_prompt_tokens - 1)
        tokens = sequence.token_ids[start + 1 : end + 1]
        texts = [index for index in range(len(tokens)) if start + 1 + index not in images]
        logits = model.logits(hidden[start - row.start : end - row.start][texts])
        found += [{} for _ in tokens]
        if texts:
            taken = [tokens[index] for index in texts]
            scores = top_logprobs(logits, taken, [count] * len(taken), text_of)
            for index, score in zip(texts, scores, strict=True):
                found[index - len(tokens)] = score
    return found
