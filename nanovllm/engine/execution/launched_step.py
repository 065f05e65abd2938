"""A launched step: rows whose tokens the device computes, and which the host has yet to read."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from nanovllm.engine.execution.model_runner import StepInputs, StepResult
from nanovllm.engine.layers.device_copy import HostCopy, to_device
from nanovllm.engine.outputs import TokenLogprobs
from nanovllm.engine.sampling.logprobs import read_scores, score_tokens
from nanovllm.engine.sampling.sampler import Sampler
from nanovllm.engine.sampling.structured_output import GuidedRows
from nanovllm.engine.scheduling.batch import ScheduledRow
from nanovllm.engine.scheduling.sequence import Sequence


@dataclass(frozen=True)
class SampledTokens:
    """The tokens that a step sampled, one for each row of logits, and their log probabilities where asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


@dataclass
class LaunchedStep:
    """A step between its launch and the end of its commit."""

    rows: tuple[ScheduledRow, ...]
    prompt_logprobs: tuple[tuple[Sequence, tuple[TokenLogprobs, ...]], ...]
    token_ids: Tensor  # int64 [sampled], on the device
    scored: dict[int, int]  # of the sampled tokens those with log probabilities, and how many each wants
    copies: HostCopy  # of the tokens, then of what `score_tokens` says of the scored ones
    is_committed: bool = False  # but for its tokens: Scheduler.schedule_behind

    @property
    def is_over(self) -> bool:
        """Whether no output wants its tokens: all have ended since."""
        return all(row.sequence.is_finished for row in self.rows)

    @property
    def can_be_followed(self) -> bool:
        """Whether the step behind this one can be planned and launched before the tokens of this one are known.

        Not where an output's constraint or penalties look at them on the host, nor where they decide how many drafts
        are accepted, nor where log probabilities of a prompt are yet to be appended.
        """
        return not any(
            row.drafts or row.sequence.lacks_prompt_logprobs or (row.is_sampled and row.sequence.needs_known_tokens)
            for row in self.rows
        )

    def read(self, text_of: Callable[[int], str]) -> SampledTokens:
        """What was sampled, once the device has computed it; ``text_of`` a token is part of its log probability."""
        token_ids, *scores = self.copies.wait()
        tokens: list[int] = token_ids.tolist()
        logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
        if scores:
            taken = [tokens[index] for index in self.scored]
            found = read_scores(scores, taken, list(self.scored.values()), text_of)
            for index, score in zip(self.scored, found, strict=True):
                logprobs[index] = score
        return SampledTokens(tokens, logprobs)


def sample(inputs: StepInputs, result: StepResult, masks: Future[GuidedRows] | None, sampler: Sampler) -> LaunchedStep:
    """Sample the next token of each row of ``result``'s logits, which are overwritten, without waiting for the device.

    ``masks`` are those of the rows' constraints, which another thread computes.
    """
    logits, sequences = result.logits, inputs.sampled_sequences
    scored = {
        index: sequence.sampling.logprobs
        for index, sequence in enumerate(sequences)
        if sequence.sampling.logprobs is not None
    }
    places = to_device(list(scored), logits.device) if scored else None
    unchanged = logits.index_select(0, places) if places is not None else None
    tokens = sampler.sample(logits, sequences, masks.result() if masks is not None else None)
    scores: tuple[Tensor, ...] = ()
    if places is not None and unchanged is not None:
        scores = score_tokens(unchanged, tokens.index_select(0, places), max(scored.values()))
    return LaunchedStep(inputs.rows, result.prompt_logprobs, tokens, scored, HostCopy([tokens, *scores]))
