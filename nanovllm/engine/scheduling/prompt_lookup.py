"""Guesses at the next tokens from what was written before: by the sequence itself, and by earlier ones of its template.

Documents repeat themselves, and requests of one template repeat one another. Where the last tokens have occurred
before, what followed them then is the draft of what follows now. A step computes the draft's tokens beside the one that
it computes anyhow; the sampler draws the token of every place, and drafts count as far as they equal what was drawn. So
they decide how fast a text comes and never which text.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.engine.scheduling.batch import ScheduledRow
    from nanovllm.engine.scheduling.sequence import Sequence

MATCH = 3
"""How many last tokens must have occurred before."""

MOST_TOKENS_A_STEP = 16
"""A step of more tokens has no drafts. Up to about here weights are the cost of a step and tokens are nearly free."""

_FIRST_DRAFT = 4  # tokens
_REST = 32  # tokens of output without a draft after one of which nothing was right
_TEMPLATE = 16  # leading tokens that make two prompts one template
_KEPT_TEMPLATES = 64
_KEPT_TOKENS = 8192  # of the outputs of one template


class Recurrences:
    """Where each run of ``MATCH`` tokens was last followed by another token, in a list that may grow."""

    def __init__(self, tokens: list[int]) -> None:
        """``tokens`` is shared with its owner, who appends to it."""
        self.tokens = tokens
        self._followers: dict[tuple[int, ...], int] = {}
        self._known = MATCH

    def continuation(self, run: tuple[int, ...], length: int) -> list[int]:
        """``length`` tokens as they followed the last ``run`` of ``MATCH`` tokens; none when it never occurred.

        What runs over the end repeats the part from the match to the end, as a text in a cycle does.
        """
        tokens = self.tokens
        for place in range(self._known, len(tokens)):
            self._followers[tuple(tokens[place - MATCH : place])] = place
        self._known = max(self._known, len(tokens))
        first = self._followers.get(run)
        if first is None:
            return []
        return [tokens[first + place % (len(tokens) - first)] for place in range(length)]


@dataclass
class Drafter:
    """What speculation knows of one sequence."""

    own: Recurrences
    limit: int  # tokens of the next draft: doubled when all were right, cut to those that were
    resting_until: int = 0  # tokens of the sequence


class Speculation:
    """Drafts for the rows of a step, and what became of them."""

    def __init__(self, max_drafts: int) -> None:
        """``max_drafts`` is the most that one row gets."""
        self.max_drafts = max_drafts
        self.num_drafted = 0
        self.num_accepted = 0
        self._templates: OrderedDict[tuple[bytes, tuple[int, ...]], Recurrences] = OrderedDict()

    def propose(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        """Up to ``room`` tokens that may come next; none that ends the output, since that saves no step."""
        if sequence.drafter is None:
            sequence.drafter = Drafter(Recurrences(sequence.token_ids), min(_FIRST_DRAFT, self.max_drafts))
        drafter = sequence.drafter
        # One token more than was drafted is sampled.
        length = min(room, drafter.limit, sequence.max_tokens - sequence.num_output_tokens - 1)
        if length < 1 or len(sequence) < drafter.resting_until:
            return ()
        run = tuple(sequence.token_ids[-MATCH:])
        drafts = drafter.own.continuation(run, length)
        if not drafts and (template := self._templates.get(_template(sequence))) is not None:
            drafts = template.continuation(run, length)
        impossible = {*sequence.stop_token_ids, *(sequence.token_ids[span.start] for span in sequence.images[:1])}
        drafts = drafts[: next((place for place, token in enumerate(drafts) if token in impossible), None)]
        if sequence.matcher is not None:
            drafts = drafts[: sequence.matcher.validate_tokens(drafts)]
        return tuple(drafts)

    def learn(self, row: ScheduledRow) -> None:
        """Take notice of how many drafts of a committed row were right."""
        drafted, accepted = len(row.drafts), row.num_accepted
        self.num_drafted += drafted
        self.num_accepted += accepted
        drafter = row.sequence.drafter
        assert drafter is not None  # it made the drafts
        drafter.limit = min(2 * drafter.limit, self.max_drafts) if accepted == drafted else max(accepted, 1)
        if accepted == 0:
            drafter.resting_until = len(row.sequence) + _REST

    def remember(self, sequence: Sequence) -> None:
        """Keep the output of a finished sequence, and the prompt's end before it, for others of its template."""
        if not sequence.num_output_tokens:
            return
        key = _template(sequence)
        end = sequence.num_prompt_tokens
        start = max(0, end - MATCH)
        if any(span.touches(start, end) for span in sequence.images):
            start = end  # nobody writes an image's placeholder, and not every vocabulary has it
        output = sequence.token_ids[start:]
        template = self._templates.pop(key, None)
        if template is None or len(template.tokens) + len(output) > _KEPT_TOKENS:
            template = Recurrences([])
        template.tokens += output[:_KEPT_TOKENS]
        self._templates[key] = template
        if len(self._templates) > _KEPT_TEMPLATES:
            self._templates.popitem(last=False)


def _template(sequence: Sequence) -> tuple[bytes, tuple[int, ...]]:
    """The salt and the leading tokens: what a prompt shares with others of its kind, and only of its tenant."""
    return sequence.cache_salt, tuple(sequence.token_ids[: min(_TEMPLATE, sequence.num_prompt_tokens)])
