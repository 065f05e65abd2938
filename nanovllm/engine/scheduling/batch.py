"""A scheduled batch: the rows that one step computes."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.engine.scheduling.block_tables import BlockTables
from nanovllm.engine.scheduling.sequence import Sequence


@dataclass(slots=True)
class ScheduledRow:
    """``num_tokens`` uncomputed tokens of one sequence from position ``start`` on, to be computed in this step.

    The last of them are ``drafts``, which the sequence does not have yet. Only ``is_committed`` changes later; a frozen
    dataclass takes several times as long to make.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    is_sampled: bool  # whether it reaches the sequence's last token, so that the next one can be sampled
    drafts: tuple[int, ...] = ()
    is_committed: bool = False

    @property
    def end(self) -> int:
        """The position after the last token: the context length of the row."""
        return self.start + self.num_tokens

    @property
    def num_samples(self) -> int:
        """How many tokens are sampled: one after the last known token, and one after each draft."""
        return 1 + len(self.drafts) if self.is_sampled else 0

    @property
    def num_accepted(self) -> int:
        """How many leading drafts equal the sequence's new tokens; call it once those are appended."""
        first = self.end - len(self.drafts)
        new = self.sequence.token_ids[first : self.end]
        pairs = enumerate(zip(new, self.drafts, strict=False))
        return next((index for index, (token, draft) in pairs if token != draft), len(new))


@dataclass(frozen=True)
class ScheduledBatch:
    """One step's rows; the block tables of their sequences already cover them.

    ``is_decode``: every row is the last token of a sequence behind its prompt, without drafts.
    """

    rows: tuple[ScheduledRow, ...]
    tables: BlockTables
    is_decode: bool = False
