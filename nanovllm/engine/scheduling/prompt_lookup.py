"""Prompt lookup decoding: drafts copied from earlier text, of the sequence itself or of earlier ones of its template.

Documents repeat themselves, and requests of one template repeat one another. Where the last tokens have occurred
before, the tokens that followed them then are the draft. A step computes the draft's tokens beside the one that it
computes anyhow; the sampler draws a token at every position, and drafts are accepted as far as they equal what was
drawn: they decide how fast a text comes and never which text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanovllm.engine.scheduling.batch import ScheduledRow
from nanovllm.engine.scheduling.sequence import Sequence

MATCH_TOKENS = 3
"""How many last tokens must have occurred before."""

_MAX_RECENT_RUNS = 1024
_FIRST_DRAFT_TOKENS = 4
_PAUSE_TOKENS = 32  # of output without a draft after one of which no token was accepted
_TEMPLATE_TOKENS = 16  # leading tokens that make two prompts one template
_MAX_TEMPLATES = 64
_MAX_TEMPLATE_OUTPUT_TOKENS = 8192


class Recurrences:
    """Where each run of ``MATCH_TOKENS`` tokens was last followed by another token, in a list that may grow.

    Runs are packed into one number each and sorted, with the index of the token behind: 12 bytes a token. The latest
    ones are in a dictionary, which takes ten times as much, until they are sorted in.
    """

    def __init__(self, tokens: list[int]) -> None:
        """``tokens`` is shared: its owner appends to it."""
        self.tokens = tokens
        self._runs = np.empty(0, np.int64)  # ascending; equal ones in the order of their followers
        self._followers = np.empty(0, np.int32)
        self._recent: dict[tuple[int, ...], int] = {}
        self._num_indexed = MATCH_TOKENS

    def continuation(self, run: tuple[int, ...], length: int) -> list[int]:
        """``length`` tokens as they followed the last ``run`` of ``MATCH_TOKENS`` tokens; none when it never occurred.

        What runs over the end repeats the part from the match to the end, as a text in a cycle does.
        """
        tokens = self.tokens
        if len(tokens) - len(self._runs) > MATCH_TOKENS + max(_MAX_RECENT_RUNS, len(tokens) // 16):
            self._sort()
        for index in range(self._num_indexed, len(tokens)):
            self._recent[tuple(tokens[index - MATCH_TOKENS : index])] = index
        self._num_indexed = max(self._num_indexed, len(tokens))
        first = self._recent.get(run) or self._find_sorted(run)
        if first is None:
            return []
        return [tokens[first + offset % (len(tokens) - first)] for offset in range(length)]

    def _sort(self) -> None:
        tokens = np.array(self.tokens)
        count = len(tokens) - MATCH_TOKENS
        runs = _pack(*(tokens[offset : offset + count] for offset in range(MATCH_TOKENS)))
        order = runs.argsort(kind="stable")
        self._runs, self._followers = runs[order], (order + MATCH_TOKENS).astype(np.int32)
        self._recent.clear()
        self._num_indexed = len(tokens)

    def _find_sorted(self, run: tuple[int, ...]) -> int | None:
        if len(run) < MATCH_TOKENS or not len(self._runs):
            return None
        key = _pack(*run)
        index = int(self._runs.searchsorted(key, "right")) - 1
        return int(self._followers[index]) if index >= 0 and self._runs[index] == key else None


def _pack(first: Any, second: Any, third: Any) -> Any:
    """Three tokens, or arrays of them, as one number: 21 bits hold any vocabulary's."""
    return (first << 42) | (second << 21) | third


@dataclass
class Drafter:
    """The state of one sequence's drafts."""

    own: Recurrences
    limit: int  # tokens of the next draft: doubled when all were accepted, cut to those that were
    paused_until: int = 0  # tokens of the sequence


class PromptLookup:
    """Proposes the drafts of a step's rows and learns which of them were accepted."""

    def __init__(self, max_drafts: int) -> None:
        """``max_drafts`` is the most that one row gets."""
        self.max_drafts = max_drafts
        self.num_drafted = 0
        self.num_accepted = 0
        self._drafters: dict[Sequence, Drafter] = {}  # from a sequence's first draft to its end
        self._templates: OrderedDict[tuple[bytes, tuple[int, ...]], Recurrences] = OrderedDict()

    def propose(self, sequence: Sequence, max_tokens: int) -> tuple[int, ...]:
        """Up to ``max_tokens`` tokens that may come next; none that ends the output, since that saves no step.

        Where the last token is not known yet, they come behind the one that it would be by the same text.
        """
        if self.max_drafts == 0:
            return ()
        drafter = self._drafters.get(sequence)
        if drafter is None:
            drafter = Drafter(Recurrences(sequence.token_ids), min(_FIRST_DRAFT_TOKENS, self.max_drafts))
            self._drafters[sequence] = drafter
        # One token more than was drafted is sampled.
        length = min(max_tokens, drafter.limit, sequence.max_tokens - sequence.num_output_tokens - 1)
        if length < 1 or len(sequence) < drafter.paused_until:
            return ()
        run, unknown = tuple(sequence.token_ids[-MATCH_TOKENS:]), sequence.num_tokens - len(sequence)
        length += unknown
        drafts = drafter.own.continuation(run, length)
        if not drafts and (template := self._templates.get(_template(sequence))) is not None:
            drafts = template.continuation(run, length)
        if not drafts:
            return ()
        impossible = {
            *sequence.stop_token_ids,
            *(sequence.token_ids[span.start + span.places[0]] for span in sequence.images[:1]),
        }
        drafts = drafts[: next((index for index, token in enumerate(drafts) if token in impossible), None)]
        if sequence.matcher is not None:
            drafts = drafts[: sequence.matcher.num_allowed(drafts)]
        return tuple(drafts[unknown:])

    def learn(self, row: ScheduledRow) -> None:
        """Set the length of a sequence's next draft by how many drafts of its committed row were accepted."""
        drafted, accepted = len(row.drafts), row.num_accepted
        self.num_drafted += drafted
        self.num_accepted += accepted
        drafter = self._drafters[row.sequence]
        drafter.limit = min(2 * drafter.limit, self.max_drafts) if accepted == drafted else max(accepted, 1)
        if accepted == 0:
            drafter.paused_until = len(row.sequence) + _PAUSE_TOKENS

    def finish(self, sequence: Sequence) -> None:
        """Drop a finished sequence's state; keep its output, and the prompt's end, for later ones of its template."""
        self._drafters.pop(sequence, None)
        if self.max_drafts == 0 or sequence.num_output_tokens == 0:
            return
        key = _template(sequence)
        end = sequence.num_prompt_tokens
        start = max(0, end - MATCH_TOKENS)
        if any(span.touches(start, end) for span in sequence.images):
            start = end  # a placeholder is never sampled, and may lie beyond the vocabulary
        output = sequence.token_ids[start:]
        template = self._templates.pop(key, None)
        if template is None or len(template.tokens) + len(output) > _MAX_TEMPLATE_OUTPUT_TOKENS:
            template = Recurrences([])
        template.tokens += output[:_MAX_TEMPLATE_OUTPUT_TOKENS]
        self._templates[key] = template
        if len(self._templates) > _MAX_TEMPLATES:
            self._templates.popitem(last=False)

    def audit(self, live: Iterable[Sequence]) -> None:
        """Check that only live sequences have a state here; raises AssertionError."""
        assert set(self._drafters) <= set(live), "prompt lookup keeps the state of a finished sequence"


def _template(sequence: Sequence) -> tuple[bytes, tuple[int, ...]]:
    """The salt and the leading tokens: what a prompt shares with others of its kind, and only of its tenant."""
    return sequence.cache_salt, tuple(sequence.token_ids[: min(_TEMPLATE_TOKENS, sequence.num_prompt_tokens)])
