"""The inputs of one forward pass, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nanovllm.engine.execution.cuda_graphs import Replay
from nanovllm.engine.models.generic_states import RowStates
from nanovllm.engine.outputs import TokenLogprobs
from nanovllm.engine.scheduling.batch import ScheduledRow
from nanovllm.engine.scheduling.sequence import Sequence


@dataclass(frozen=True)
class StepTokens:
    """The T tokens of all rows, and the model's other inputs."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [T], or [T, 3] where the family counts height and width too
    images: tuple[tuple[int, Tensor], ...]  # index of the first token, and embeddings [n, width]
    attention: Any
    sampling_indices: Tensor | None  # [rows of logits]; None when every token samples
    scored: tuple[tuple[ScheduledRow, int], ...]  # rows whose prompt tokens want logprobs, and their first token
    states: tuple[RowStates, ...]  # of every row, where layers of the model carry a state; else empty


@dataclass(frozen=True)
class StepInputs:
    """One forward pass: the rows in the order of their tokens, what is computed, and for whom."""

    rows: tuple[ScheduledRow, ...]
    sampled_sequences: tuple[Sequence, ...]  # for each row of logits the sequence, with the drafts before it appended
    tokens: StepTokens | Replay  # Replay: they are in a CUDA graph already
    is_decode: bool = False  # every row is the last token of a sequence behind its prompt, without drafts


@dataclass(frozen=True)
class StepResult:
    """What a forward pass computed. Nothing of it is in a sequence before the step is committed."""

    logits: Tensor  # [sampling rows, vocab]
    prompt_logprobs: tuple[tuple[Sequence, tuple[TokenLogprobs, ...]], ...]  # to be appended to the sequence's own
