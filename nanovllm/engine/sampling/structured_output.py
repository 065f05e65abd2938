"""Structured output: the tokens that a constraint allows next, as masks over the logits.

A constrained sequence has a matcher. Between two steps the matcher has consumed every token of the output; its mask of
allowed tokens is computed while the forward pass runs, and tokens that are the only possible ones are appended without
a decode step each.
"""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanovllm.engine import kernels
from nanovllm.engine.layers.device_copy import move

_MINUS_INFINITY = float("-inf")
_BITS = 32

MATCHER_CPU_S = 1.0
MATCHER_CPU_S_PER_STEP = 0.02
"""Processor time of a matcher: what an output may take in all, and what each of its steps adds. llguidance bounds the
work of one call to some tenths of a second, which an ambiguous grammar takes at every token."""


@dataclass
class _Account:
    left_s: float = MATCHER_CPU_S

    @contextmanager
    def charge(self) -> Iterator[None]:
        began = time.thread_time()
        try:
            yield
        finally:
            self.left_s -= time.thread_time() - began


class Matcher:
    """Matcher of one output: what its constraint allows next, within a budget of processor time.

    ``compiled`` is an ``llguidance.LLMatcher`` that no other sequence has.
    """

    def __init__(self, compiled: Any, account: _Account | None = None) -> None:
        self._compiled = compiled
        self._account = account or _Account()

    def trial_copy(self) -> Matcher:
        """A copy for drafts, which a dead end may spoil; its time is charged to this one."""
        with self._account.charge():
            return Matcher(self._compiled.deep_copy(), self._account)

    def fill_mask(self, mask: Tensor) -> None:
        """Write the allowed tokens to ``mask``, int32 [words]."""
        with self._account.charge():
            self._compiled.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)

    def consume(self, token: int) -> None:
        """Go on behind ``token``, the next of the output."""
        with self._account.charge():
            self._compiled.consume_token(token)

    def forced_tokens(self) -> list[int]:
        """The tokens that are the only possible ones from here on."""
        with self._account.charge():
            return list(self._compiled.compute_ff_tokens())

    def num_allowed(self, tokens: abc.Sequence[int]) -> int:
        """How many of ``tokens``, one after another, are allowed."""
        with self._account.charge():
            return int(self._compiled.validate_tokens(tokens))

    def begin_step(self) -> None:
        """Add what a step may take."""
        self._account.left_s = min(MATCHER_CPU_S, self._account.left_s + MATCHER_CPU_S_PER_STEP)

    @property
    def failure(self) -> str | None:
        """Why the output cannot go on; None while it can."""
        if self._account.left_s < 0:
            return "the constraint is ambiguous: computing which tokens it allows takes too long"
        if self._compiled.is_error():
            return "the constraint is too complex, or allows no token after the text so far"
        return None

    @property
    def is_stopped(self) -> bool:
        """Whether the text is complete and nothing may follow."""
        return bool(self._compiled.is_stopped())

    @property
    def is_accepting(self) -> bool:
        """Whether the text is complete, and something may follow."""
        return bool(self._compiled.is_accepting())


@dataclass(frozen=True)
class GuidedRows:
    """The rows of a step that are under a constraint, int64 [n], and their masks, int32 [n, words], bit 1 = allowed."""

    rows: Tensor
    masks: Tensor

    def to(self, device: torch.device) -> GuidedRows:
        """The same on ``device``, without waiting for it."""
        return GuidedRows(move(self.rows, device), move(self.masks, device))


class TokenMasks:
    """Masks of allowed tokens, computed in a thread of their own during the forward pass."""

    def __init__(self, vocab_size: int) -> None:
        self._words = -(-vocab_size // _BITS)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="nanovllm-masks")

    def begin(self, rows: abc.Sequence[tuple[Matcher | None, tuple[int, ...]]]) -> Future[GuidedRows] | None:
        """Start on the rows of a step: each a matcher, None where it is unconstrained, and its drafts.

        A row samples its next token and one after each draft, so that it has as many rows of logits. None where no row
        has a matcher. Until the result is there the matchers belong to the other thread.
        """
        if all(matcher is None for matcher, _ in rows):
            return None
        return self._executor.submit(self._fill, list(rows))

    def _fill(self, rows: abc.Sequence[tuple[Matcher | None, tuple[int, ...]]]) -> GuidedRows:
        count = sum(1 + len(drafts) for matcher, drafts in rows if matcher is not None)
        guided = GuidedRows(
            torch.empty(count, dtype=torch.int64), torch.full((count, self._words), -1, dtype=torch.int32)
        )
        places, each_mask, place = guided.rows.numpy(), enumerate(guided.masks), 0
        for matcher, drafts in rows:
            if matcher is not None:
                matcher.begin_step()
                # A draft may lead into a dead end, and LLMatcher.rollback does not clear a matcher's error.
                matcher = matcher.trial_copy() if drafts else matcher
                for num_drafts in range(1 + len(drafts)):
                    index, mask = next(each_mask)
                    places[index] = place + num_drafts
                    if num_drafts:
                        matcher.consume(drafts[num_drafts - 1])
                    matcher.fill_mask(mask)
            place += 1 + len(drafts)
        return guided

    def close(self) -> None:
        """Stop the thread."""
        self._executor.shutdown(wait=False)


def forbid_masked(logits: Tensor, guided: GuidedRows) -> None:
    """Set the logits [rows, vocab] whose bit in the masks of ``guided`` is 0 to minus infinity, in place."""
    if logits.is_cpu and logits.is_contiguous() and kernels.missing() is None:
        torch.ops.nanovllm.forbid_masked(logits, guided.rows, guided.masks)
    else:
        forbid_by_torch(logits, guided)


def forbid_by_torch(logits: Tensor, guided: GuidedRows) -> None:
    """`forbid_masked` by torch's operators."""
    bits = torch.arange(_BITS, dtype=torch.int32, device=logits.device)
    allowed = (guided.masks.unsqueeze(-1) >> bits) & 1
    own = logits.index_select(0, guided.rows)
    own.masked_fill_(allowed.flatten(1)[:, : logits.shape[1]] == 0, _MINUS_INFINITY)
    logits.index_copy_(0, guided.rows, own)
