"""Continuous batching: one token budget a step, without prefill and decode phases.

Every sequence has tokens and computed tokens. A step's budget goes first to the running sequences (most of them lack
one token), then to waiting ones, each in order of priority and arrival. A long prompt gets what is left of the budget
and continues in the next step (chunked prefill); the tokens of a cached prefix count as computed. Drafts
(prompt_lookup.py) are computed too where the budget allows it; commit takes back those that sampling did not confirm.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count, pairwise

from nanovllm.engine.scheduling.batch import ScheduledBatch, ScheduledRow
from nanovllm.engine.scheduling.block_manager import BlockManager
from nanovllm.engine.scheduling.block_tables import BlockTables
from nanovllm.engine.scheduling.prompt_lookup import PromptLookup
from nanovllm.engine.scheduling.sequence import Sequence, SequenceStatus
from nanovllm.engine.step_limits import CPU_LIMITS


@dataclass
class StepBudget:
    """What the step that is being scheduled may still take: tokens, and seats of the running batch."""

    tokens: int
    seats: int


class Scheduler:
    """The waiting queue, the running batch, and the rows of each step.

    No sequence starves: the first one in order may preempt all others, and the input processor has checked that it
    fits the cache alone; so it finishes, and the next one is first.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_draft_step_tokens: int = CPU_LIMITS.max_draft_step_tokens,
        num_speculative_tokens: int = 0,
        tables: BlockTables | None = None,
    ) -> None:
        """``blocks`` and ``tables`` are used by this scheduler alone; without ``tables`` they hold all blocks."""
        self.blocks = blocks
        self.tables = tables or BlockTables(max_num_seqs, blocks.num_blocks)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_draft_step_tokens = max_draft_step_tokens
        self.running: list[Sequence] = []  # both lists are sorted by priority, then arrival
        self.waiting: list[Sequence] = []
        self.prompt_lookup = PromptLookup(num_speculative_tokens)
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0

    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that is known to fit the cache when it runs alone."""
        insort(self.waiting, sequence)

    def schedule(self) -> ScheduledBatch:
        """Choose the rows of the next step and allocate the blocks that they write to.

        Writes the two queues, the tables, the counters of preemptions and prefix hits and, of a sequence that it
        starts, continues or preempts, status, seat, block table and the numbers of computed and cached tokens; of a
        preempted one it drops the images' embeddings. It writes nothing else of any sequence.
        """
        return self._schedule(may_preempt=True)

    def schedule_behind(self, launched: Iterable[ScheduledRow]) -> ScheduledBatch:
        """Choose the rows of the step behind ``launched`` ones, before the tokens that these sample are known.

        Commits the launched rows, which have no drafts; the commit behind their tokens then does nothing more.
        Preempts nothing: where blocks are short there are no rows, since an output that ends may free them.
        """
        places = count()
        for row in launched:
            place = next(places) if row.is_sampled else None
            if row.sequence.status is SequenceStatus.RUNNING:
                self.commit(row)
                row.is_committed, row.sequence.pending = True, place
        return self._schedule(may_preempt=False)

    def _schedule(self, *, may_preempt: bool) -> ScheduledBatch:
        budget = StepBudget(self.max_num_batched_tokens, self.max_num_seqs - len(self.running))
        num_preemptions = self.num_preemptions
        rows, is_decode = self._continue_running(budget, may_preempt=may_preempt)
        # A step that had to preempt has no blocks for waiting sequences and drafts.
        if self.num_preemptions == num_preemptions:
            admitted = self._admit_waiting(budget)
            known = rows + admitted
            rows = self._add_drafts(known, budget)
            is_decode = is_decode and not admitted and rows is known
        return ScheduledBatch(tuple(rows), self.tables, is_decode)

    def _continue_running(self, budget: StepBudget, *, may_preempt: bool) -> tuple[list[ScheduledRow], bool]:
        """Rows of running sequences, in order, and whether all are the last token of a sequence behind its prompt.

        Where blocks are short, those at the end of the order are preempted. Where that must not be, there are no rows
        and no budget is left.
        """
        rows: list[ScheduledRow] = []
        is_decode, size, running = True, self.blocks.block_size, SequenceStatus.RUNNING
        for sequence in list(self.running):
            if budget.tokens == 0:
                break
            if sequence.status is not running:
                continue  # preempted below, for a sequence before it
            start = sequence.num_computed_tokens
            missing = len(sequence.token_ids) - start
            if sequence.pending is not None:
                if sequence.num_output_tokens == sequence.max_tokens:
                    continue  # its last token is on the device
                missing += 1
            if missing != 1 or start < sequence.num_prompt_tokens:
                is_decode = False
            elif start < len(sequence.block_table) * size:  # most rows of most steps
                budget.tokens -= 1
                rows.append(ScheduledRow(sequence, start, 1, True))
                continue
            num_tokens = min(missing, budget.tokens)
            row = ScheduledRow(sequence, start, num_tokens, num_tokens == missing)
            while not self._extend_block_table(row):
                if not may_preempt:
                    budget.tokens = 0
                    return [], False
                if self._preempt_last() is sequence:
                    break
            else:
                budget.tokens -= row.num_tokens
                rows.append(row)
        return rows, is_decode

    def _admit_waiting(self, budget: StepBudget) -> list[ScheduledRow]:
        """First rows of waiting sequences, in order, as far as seats, tokens and blocks go."""
        rows: list[ScheduledRow] = []
        if budget.tokens == 0 or budget.seats == 0:
            return rows
        in_flight, put_off = self._in_flight_hashes(), 0
        # As many as there are seats take them all when the blocks are computed; to look at more costs the running ones.
        while put_off < min(len(self.waiting), self.max_num_seqs) and budget.tokens and budget.seats:
            sequence = self.waiting[put_off]
            reusable = self._reusable_hashes(sequence)
            cached = self.blocks.match_prefix(reusable)
            # A running sequence has yet to compute the very next block: reuse it then instead of computing it twice.
            if len(cached) < len(reusable) and reusable[len(cached)] in in_flight:
                put_off += 1
                continue
            if not self.blocks.can_allocate(self.blocks.blocks_for(len(sequence)) - len(cached), cached):
                break  # head-of-line: a later sequence must not take the blocks that this one waits for
            start = len(cached) * self.blocks.block_size
            num_tokens = min(len(sequence) - start, budget.tokens)
            row = ScheduledRow(sequence, start, num_tokens, start + num_tokens == len(sequence))
            sequence.block_table = self.blocks.allocate(self.blocks.blocks_for(row.end) - len(cached), cached)
            sequence.seat = self.tables.take_seat()
            self.tables.extend(sequence.seat, sequence.block_table)
            self._start(sequence, start)
            if self.blocks.enable_prefix_caching:
                in_flight.update(sequence.block_hashes(self.blocks.block_size)[len(cached) :])
            budget.tokens -= row.num_tokens
            budget.seats -= 1
            rows.append(row)
        return rows

    def _add_drafts(self, rows: list[ScheduledRow], budget: StepBudget) -> list[ScheduledRow]:
        """The same rows, those that sample with drafts, as long as the step stays small and blocks are free.

        It is the same list where no row gets any.
        """
        num_tokens = self.max_num_batched_tokens - budget.tokens
        budget.tokens = min(budget.tokens, self.max_draft_step_tokens - num_tokens)
        if budget.tokens <= 0 or self.prompt_lookup.max_drafts == 0:
            return rows
        drafted, has_drafts = [], False
        for row in rows:
            may_draft = row.is_sampled and budget.tokens > 0
            if may_draft and (drafts := self.prompt_lookup.propose(row.sequence, budget.tokens)):
                longer = replace(row, num_tokens=row.num_tokens + len(drafts), drafts=drafts)
                if self._extend_block_table(longer):
                    budget.tokens -= len(drafts)
                    row, has_drafts = longer, True
            drafted.append(row)
        return drafted if has_drafts else rows

    def _extend_block_table(self, row: ScheduledRow) -> bool:
        """Allocate the blocks that the sequence lacks up to the row's end; False where too few are free."""
        sequence = row.sequence
        covered = len(sequence.block_table)
        missing = self.blocks.blocks_for(row.end) - covered
        if missing <= 0:
            return True
        if not self.blocks.can_allocate(missing):
            return False
        sequence.block_table += self.blocks.allocate(missing)
        self.tables.extend(sequence.seat, sequence.block_table[covered:])
        return True

    def _start(self, sequence: Sequence, num_cached: int) -> None:
        """Move a waiting sequence to the running batch; its first ``num_cached`` tokens are computed already."""
        sequence.num_computed_tokens = num_cached
        sequence.status = SequenceStatus.RUNNING
        _remove(self.waiting, sequence)
        insort(self.running, sequence)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = num_cached
            self.prefix_cache_queries += len(sequence)
            self.prefix_cache_hits += num_cached

    def _preempt_last(self) -> Sequence:
        """Move the running sequence that is last in order back to the waiting queue; it will be computed again."""
        sequence = self.running.pop()
        self._release(sequence)
        sequence.num_computed_tokens = 0
        sequence.status = SequenceStatus.WAITING
        insort(self.waiting, sequence)
        self.num_preemptions += 1
        return sequence

    def _reusable_hashes(self, sequence: Sequence) -> list[bytes]:
        """The hashes of the leading blocks that a waiting sequence may reuse."""
        if sequence.lacks_prompt_logprobs:
            return []
        # The last token is always computed: sampling needs its logits.
        size = self.blocks.block_size
        return sequence.block_hashes(size)[: (len(sequence) - 1) // size]

    def images_in_order(self) -> Iterator[tuple[Sequence, int]]:
        """Sequences with images in scheduling order, with computed tokens; of waiting ones, those that are cached."""
        for sequence in self.running:
            if sequence.images:
                yield sequence, sequence.num_computed_tokens
        for sequence in self.waiting:
            if sequence.images:
                yield sequence, len(self.blocks.match_prefix(self._reusable_hashes(sequence))) * self.blocks.block_size

    def _in_flight_hashes(self) -> set[bytes]:
        """The hashes of the full blocks that running sequences have yet to compute."""
        if not (self.waiting and self.blocks.enable_prefix_caching):
            return set()
        size = self.blocks.block_size
        return {
            key
            for sequence in self.running
            if sequence.num_uncomputed_tokens > 1
            for key in sequence.block_hashes(size)[sequence.num_computed_tokens // size :]
        }

    def commit(self, row: ScheduledRow) -> None:
        """Count a computed row's tokens as computed, name its full blocks, and drop the embeddings of computed images.

        The tokens that the row sampled are appended before. The drafts that are not among them are rejected, and the
        blocks that those alone needed are freed.
        """
        sequence, size = row.sequence, self.blocks.block_size
        sequence.pending = None
        if row.is_committed:
            return
        computed = row.start + row.num_tokens
        if row.drafts:
            computed -= len(row.drafts) - row.num_accepted
            self.prompt_lookup.learn(row)
            num_blocks = self.blocks.blocks_for(computed)
            self.tables.cut(sequence.seat, num_blocks)
            self.blocks.free(sequence.block_table[num_blocks:])
            del sequence.block_table[num_blocks:]
        first, last = row.start // size, computed // size
        if first != last:
            hashes = sequence.block_hashes(size)
            for block in range(first, last):
                self.blocks.cache_block(sequence.block_table[block], hashes[block])
        sequence.num_computed_tokens = computed
        if sequence.images:
            sequence.drop_embeddings(computed)

    def finish(self, sequence: Sequence) -> None:
        """Remove a waiting or running sequence and free its blocks, though a launched step may still use them.

        Later steps write to them later: the device computes steps in the order of their launches.
        """
        sequence.pending = None
        queue = self.running if sequence.status is SequenceStatus.RUNNING else self.waiting
        _remove(queue, sequence)
        self._release(sequence)
        self.prompt_lookup.finish(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _release(self, sequence: Sequence) -> None:
        if sequence.seat >= 0:
            self.tables.leave(sequence.seat)
            sequence.seat = -1
        self.blocks.free(sequence.block_table)
        sequence.block_table = []
        sequence.states = None
        sequence.drop_embeddings()

    def audit(self) -> None:
        """Check the invariants of queues and blocks between two steps; raises AssertionError."""
        self.blocks.audit(sequence.block_table for sequence in self.running)
        self.tables.audit((sequence.seat, sequence.block_table) for sequence in self.running)
        self.prompt_lookup.audit([*self.running, *self.waiting])
        assert len(self.running) <= self.max_num_seqs, "more sequences run than there are seats"
        for queue, status in ((self.running, SequenceStatus.RUNNING), (self.waiting, SequenceStatus.WAITING)):
            assert all(earlier < later for earlier, later in pairwise(queue)), "out of order"
            assert all(sequence.status is status for sequence in queue), f"a wrong state in the {status.value} queue"
        for sequence in self.waiting:
            assert not sequence.block_table, f"{sequence.request_id} waits and holds blocks"
            pinned = [span for span in sequence.images if span.embedding is not None]
            assert not pinned, f"{sequence.request_id} waits and pins {len(pinned)} images"
        for sequence in self.running:
            assert sequence.pending is None, f"{sequence.request_id} lacks a token that was read"
            assert sequence.num_computed_tokens <= len(sequence), f"{sequence.request_id} is computed beyond its end"
            covered = len(sequence.block_table) * self.blocks.block_size
            assert sequence.num_computed_tokens <= covered, f"{sequence.request_id} has computed tokens without a block"


def _remove(queue: list[Sequence], sequence: Sequence) -> None:
    """Remove a sequence from a sorted queue that holds it, without looking at all others."""
    place = bisect_left(queue, sequence)
    assert queue[place] is sequence, "a queue is out of order"
    del queue[place]
