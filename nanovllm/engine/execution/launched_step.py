"""A launched step: rows whose tokens the device computes, and which the host has yet to read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from nanovllm.engine.execution.image_embeddings import attach_image_embeddings
from nanovllm.engine.execution.model_runner import ModelRunner
from nanovllm.engine.execution.step_inputs import StepInputs, StepResult
from nanovllm.engine.kernels import step_threads
from nanovllm.engine.layers.device_copy import HostCopy, to_device
from nanovllm.engine.outputs import TokenLogprobs
from nanovllm.engine.sampling.logprobs import read_scores, score_tokens
from nanovllm.engine.sampling.sampler import Sampler
from nanovllm.engine.sampling.structured_output import GuidedRows, TokenMasks
from nanovllm.engine.scheduling.batch import ScheduledBatch, ScheduledRow
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
    has_plain_tokens: bool = False  # one a row, behind prompts, without constraints and log probabilities

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
        if self.has_plain_tokens:
            return not any(row.sequence.needs_known_tokens for row in self.rows)
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


def launch(
    runner: ModelRunner,
    sampler: Sampler,
    masks: TokenMasks,
    scheduled: ScheduledBatch,
    upcoming: Iterable[tuple[Sequence, int]],
    sampled_before: Tensor | None,
) -> LaunchedStep:
    """Prepare, compute and sample the scheduled rows, without waiting for the device.

    ``upcoming`` is `Scheduler.images_in_order`; ``sampled_before`` are the tokens of a step that these are behind.
    """
    if not scheduled.is_decode:
        now = time.perf_counter()
        for row in scheduled.rows:
            row.sequence.times.first_scheduled = row.sequence.times.first_scheduled or now
        attach_image_embeddings(runner, scheduled.rows, upcoming)
    inputs = runner.prepare(scheduled, sampled_before)
    wanted = None
    if any(row.sequence.matcher is not None for row in inputs.rows):
        # They are computed by another thread while the forward pass runs.
        wanted = masks.begin([(row.sequence.matcher, row.drafts) for row in inputs.rows if row.is_sampled])
    with step_threads.awake() if runner.device.type == "cpu" else nullcontext():
        return sample(inputs, runner.forward(inputs), wanted, sampler)


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
    copies = HostCopy([tokens, *scores])
    is_plain = inputs.is_decode and masks is None and not scored
    return LaunchedStep(inputs.rows, result.prompt_logprobs, tokens, scored, copies, has_plain_tokens=is_plain)
