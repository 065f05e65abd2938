"""What the next step computes: one token budget, no phases.

Every sequence has tokens and computed tokens. A plan gives the budget first to the running sequences (most of them miss
one token), then to waiting ones, each in order of priority and arrival. A long prompt gets what is left of the budget
and goes on in the next step; a prefix found in the cache is simply computed already. Drafts (speculation.py) are tokens
that a step computes too, where room is left, and that its commit takes back unless they turn out right.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from nanovllm.engine.scheduling.batch import ScheduledBatch, ScheduledRow
from nanovllm.engine.scheduling.block_manager import BlockManager
from nanovllm.engine.scheduling.prompt_lookup import MOST_TOKENS_A_STEP, Speculation
from nanovllm.engine.scheduling.sequence import Sequence, SequenceStatus


class Scheduler:
    """The waiting queue, the running batch, and the rules between them.

    Nothing starves: the first sequence in order may preempt every other one, and admission has made sure that it fits
    the cache alone; so it finishes, and the next one is first.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_speculative_tokens: int = 0,
    ) -> None:
        """``blocks`` belongs to the scheduler from here on."""
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Sequence] = []  # both lists are sorted by priority, then arrival
        self.waiting: list[Sequence] = []
        self.speculation = Speculation(num_speculative_tokens)
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
        """Choose the rows of the next step and take the blocks that they write to."""
        rows: list[ScheduledRow] = []
        preempted = False
        budget = self.max_num_batched_tokens
        for sequence in list(self.running):
            if budget == 0 or sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted below by one that goes before it
            row = ScheduledRow(sequence, sequence.num_computed_tokens, min(sequence.num_uncomputed_tokens, budget))
            missing = self._missing_blocks(row)
            while not self.blocks.can_allocate(missing):
                preempted = True
                if self._preempt_last() is sequence:
                    break
            else:
                sequence.block_table += self.blocks.allocate(missing)
                rows.append(row)
                budget -= row.num_tokens
        # A step that had to take blocks away has none to give to newcomers.
        if not preempted:
            rows += self._admit(budget)
            rows = list(self._with_drafts(rows))
        return ScheduledBatch(tuple(rows))

    def _missing_blocks(self, row: ScheduledRow) -> int:
        return max(0, self.blocks.blocks_for(row.end) - len(row.sequence.block_table))

    def _preempt_last(self) -> Sequence:
        """Take everything from the running sequence that is last in order; it will be computed again."""
        sequence = self.running.pop()
        self._let_go(sequence)
        sequence.num_computed_tokens = 0
        sequence.status = SequenceStatus.WAITING
        insort(self.waiting, sequence)
        self.num_preemptions += 1
        return sequence

    def _admit(self, budget: int) -> Iterator[ScheduledRow]:
        """Start waiting sequences in order, as far as seats, budget and blocks go."""
        in_flight = self._in_flight_hashes()
        for sequence in list(self.waiting):
            if budget == 0 or len(self.running) >= self.max_num_seqs:
                return
            reusable = self._reusable_hashes(sequence)
            cached = self.blocks.match_prefix(reusable)
            # Another sequence computes the very next block right now: wait for it instead of computing it twice.
            if len(cached) < len(reusable) and reusable[len(cached)] in in_flight:
                continue
            num_cached = len(cached) * self.blocks.block_size
            if not self.blocks.can_allocate(self.blocks.blocks_for(len(sequence)) - len(cached), cached):
                return  # nobody behind it may take the blocks that it waits for
            num_tokens = min(len(sequence) - num_cached, budget)
            num_new = self.blocks.blocks_for(num_cached + num_tokens) - len(cached)
            sequence.block_table = self.blocks.allocate(num_new, cached)
            sequence.num_computed_tokens = num_cached
            sequence.status = SequenceStatus.RUNNING
            self.waiting.remove(sequence)
            insort(self.running, sequence)
            if sequence.num_cached_tokens is None:
                sequence.num_cached_tokens = num_cached
                self.prefix_cache_queries += len(sequence)
                self.prefix_cache_hits += num_cached
            if self.blocks.enable_prefix_caching:
                in_flight.update(sequence.block_hashes(self.blocks.block_size)[len(cached) :])
            budget -= num_tokens
            yield ScheduledRow(sequence, num_cached, num_tokens)

    def _reusable_hashes(self, sequence: Sequence) -> list[bytes]:
        """The hashes of the leading blocks that a waiting sequence may find in the prefix cache."""
        if sequence.lacks_prompt_logprobs:
            return []
        # At least one token is left to compute: without it there would be no logits to sample from.
        size = self.blocks.block_size
        return sequence.block_hashes(size)[: (len(sequence) - 1) // size]

    def upcoming(self) -> Iterator[tuple[Sequence, int]]:
        """All sequences in the order in which they are computed, each with its first token that has yet to be.

        Of waiting ones, tokens that the prefix cache holds count as computed.
        """
        for sequence in self.running:
            yield sequence, sequence.num_computed_tokens
        for sequence in self.waiting:
            yield sequence, len(self.blocks.match_prefix(self._reusable_hashes(sequence))) * self.blocks.block_size

    def _with_drafts(self, rows: list[ScheduledRow]) -> Iterator[ScheduledRow]:
        """Add drafts to the rows that sample, as long as the step stays small and blank blocks are there."""
        room = min(self.max_num_batched_tokens, MOST_TOKENS_A_STEP) - sum(row.num_tokens for row in rows)
        for row in rows:
            drafts = self.speculation.propose(row.sequence, room) if row.samples and room > 0 else ()
            longer = replace(row, num_tokens=row.num_tokens + len(drafts), drafts=drafts)
            missing = self._missing_blocks(longer)
            if not drafts or not self.blocks.can_allocate(missing):
                yield row
                continue
            row.sequence.block_table += self.blocks.allocate(missing)
            room -= len(drafts)
            yield longer

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
        """Book a computed row: its tokens count as computed, and its full blocks enter the prefix cache.

        The tokens that the row sampled are appended before. Of its drafts only those stay that are among them; the
        blocks that the others alone needed are given back.
        """
        sequence, size = row.sequence, self.blocks.block_size
        computed = row.end
        if row.drafts:
            computed -= len(row.drafts) - row.num_accepted
            self.speculation.learn(row)
            kept = self.blocks.blocks_for(computed)
            self.blocks.free(sequence.block_table[kept:])
            del sequence.block_table[kept:]
        first, last = row.start // size, computed // size
        if first != last:
            hashes = sequence.block_hashes(size)
            for block in range(first, last):
                self.blocks.cache_block(sequence.block_table[block], hashes[block])
        sequence.num_computed_tokens = computed

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, in whatever state it is."""
        queue = self.running if sequence.status is SequenceStatus.RUNNING else self.waiting
        queue.remove(sequence)
        self._let_go(sequence)
        if self.speculation.max_drafts:
            self.speculation.remember(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _let_go(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.block_table)
        sequence.block_table = []
        sequence.drop_embeddings()

    def audit(self) -> None:
        """Check the invariants of queues and blocks between two steps; raises AssertionError."""
        self.blocks.audit(sequence.block_table for sequence in self.running)
        assert len(self.running) <= self.max_num_seqs, "more sequences run than there are seats"
        for queue, status in ((self.running, SequenceStatus.RUNNING), (self.waiting, SequenceStatus.WAITING)):
            assert all(earlier < later for earlier, later in pairwise(queue)), "out of order"
            assert all(sequence.status is status for sequence in queue), f"a wrong state in the {status.value} queue"
        for sequence in self.waiting:
            assert not sequence.block_table, f"{sequence.request_id} waits and holds blocks"
            pinned = [span for span in sequence.images if span.embedding is not None]
            assert not pinned, f"{sequence.request_id} waits and pins {len(pinned)} images"
        for sequence in self.running:
            assert sequence.num_computed_tokens <= len(sequence), f"{sequence.request_id} is computed beyond its end"
            covered = len(sequence.block_table) * self.blocks.block_size
            assert sequence.num_computed_tokens <= covered, f"{sequence.request_id} has computed tokens without a block"
