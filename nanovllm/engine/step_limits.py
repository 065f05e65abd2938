"""The limits of a step, seats, tokens and drafts: what the user sets, else what fits the device and the model."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.engine.config import EngineConfig

_GIB = 1 << 30


@dataclass(frozen=True)
class StepLimits:
    """The most that one step of the engine takes.

    Attributes:
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens of all rows.
        max_draft_step_tokens: tokens of a step beyond which it has no drafts: up to about there reading the weights is
            its cost, and a token more adds little.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_draft_step_tokens: int

    def decode_tokens(self, num_speculative_tokens: int) -> int:
        """The most tokens of a step without a prompt's: a seat has one, and drafts fill a small step up."""
        drafted = self.max_draft_step_tokens if num_speculative_tokens else 0
        return min(self.max_num_batched_tokens, max(self.max_num_seqs, drafted))


CPU_LIMITS = StepLimits(64, 512, 16)
"""What a layer computes for 512 tokens still lies in a CPU's cache."""

_COPYING = StepLimits(64, 2048, 16)
"""On a GPU where attention copies pages: every row and draft costs a copy of its context (see docs/engine.md)."""

_BY_MEMORY = ((64, 256, 8192), (30, 256, 4096), (20, 128, 4096), (0, 64, 2048))
"""GiB of a GPU, and the most seats and tokens of one with as many.

Python starts the kernels of a prompt's step in 5 to 10 ms, whatever their size. On an H100 a model of 0.6 billion
parameters computes 4,000 tokens in that time, on a card of 24 GB 1,000; more tokens hide it. More than these would gain
little, and hold up the rows that decode in the same step: 8,192 tokens of 8 billion parameters take an H100 0.3 s.
"""

_LEAST_SEATS, _LEAST_TOKENS, _LEAST_DRAFTS = 8, 1024, 16
_SEAT_TOKENS = 1024
"""Prompt and answer of a usual request. With less room a seat costs more in preemptions than it brings."""

_ACTIVATION_SHARE = 8
"""A step's hidden states, and its sampling, may each have one part in so many of the memory."""

_HIDDEN_COPIES = 24
"""Rows of hidden states that a layer keeps of a token at its peak: residual, heads, and a gated layer of three to five
times the width with its product."""

_SORTING_BYTES, _SEARCHING_BYTES = 82, 12
"""Of a logit where torch's operators draw, counted on a CPU: sorted copies, and four words of 64 bits of noise; and
where Triton's kernel does: a token that may be the limit, or the log probabilities that are computed afterwards."""


@dataclass(frozen=True)
class Device:
    """A device as far as limits depend on it; ``memory`` in bytes, all of it, and a GPU's compute capability."""

    type: str
    memory: int = 0
    capability: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class ModelCosts:
    """What a model takes on the device.

    Attributes:
        kv_token: bytes of a token's keys and values in all layers.
        hidden_row: bytes of a token's hidden state.
        vocab_size: logits of a token.
        itemsize: bytes of a number.
        context: tokens of the longest context.
        copies_pages: whether attention copies the pages that it reads.
        sorts_logits: whether torch's operators draw tokens, not Triton's kernel.
    """

    kv_token: int
    hidden_row: int
    vocab_size: int
    itemsize: int
    context: int
    copies_pages: bool = False
    sorts_logits: bool = False


def choose_step_limits(config: EngineConfig, device: Device, room: int, model: ModelCosts) -> StepLimits:
    """The limits that ``config`` sets, else those that fit.

    ``room``: bytes of the device for the KV cache and activations together. A CPU's limits depend on none of it.
    """
    if device.type == "cpu":
        fitting = CPU_LIMITS
    elif model.copies_pages:
        fitting = _COPYING
    else:
        fitting = _limits_of_gpu(config, device, room, model)
    return StepLimits(
        config.max_num_seqs or fitting.max_num_seqs,
        config.max_num_batched_tokens or fitting.max_num_batched_tokens,
        fitting.max_draft_step_tokens,
    )


def _limits_of_gpu(config: EngineConfig, device: Device, room: int, model: ModelCosts) -> StepLimits:
    seats, tokens = next((seats, tokens) for gib, seats, tokens in _BY_MEMORY if device.memory >= gib * _GIB)
    kv_room = room if config.kv_cache_bytes is None else min(room, config.kv_cache_bytes)
    seat = model.kv_token * min(_SEAT_TOKENS, model.context)
    sampling_bytes = _SORTING_BYTES if model.sorts_logits else _SEARCHING_BYTES
    logits_row = model.vocab_size * (2 * model.itemsize + sampling_bytes)  # computed, and kept by the graphs
    most = room // _ACTIVATION_SHARE
    seats = _halved(seats, min(kv_room // seat, most // logits_row), _LEAST_SEATS)
    tokens = _halved(tokens, most // (_HIDDEN_COPIES * model.hidden_row), _LEAST_TOKENS)
    # Operations a byte of memory bandwidth, where weights have two bytes: 295 on an H100, 206 on an H200, 150 to 200 on
    # most cards before. Half of it, because a draft reads its row's context like a row of its own.
    drafts = (128 if device.capability[0] in (9, 10) else 64) // (1 if model.itemsize == 2 else 4)
    return StepLimits(seats, tokens, _halved(drafts, most // logits_row, _LEAST_DRAFTS))


def _halved(value: int, most: int, least: int) -> int:
    """``value``, halved until it is ``most`` or less, but no less than ``least``."""
    while value > max(most, least):
        value //= 2
    return value
