"""The partition ledger: a contiguous watermark over delivered offsets."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)
from strategies import examples

from nanovllm.pipeline.consuming.ledger import PartitionLedger


def ledger(position: int = 0, *, max_out_of_order: int = 1_000) -> PartitionLedger:
    return PartitionLedger(position, max_out_of_order=max_out_of_order)


def test_finishing_out_of_order_moves_the_watermark_only_over_what_is_contiguous() -> None:
    of = ledger(10)
    for offset in (10, 11, 12):
        of.deliver(offset)
    assert of.complete(12)
    assert of.watermark == 10
    assert of.complete(10)
    assert of.watermark == 11
    assert of.complete(11)
    assert of.watermark == 13
    of.audit()


def test_gaps_between_delivered_offsets_are_passed() -> None:
    of = ledger()
    for offset in (3, 90, 1_000_000):
        of.deliver(offset)
    of.complete(3)
    assert of.watermark == 90
    of.complete(90)
    of.complete(1_000_000)
    assert of.watermark == 1_000_001


def test_an_idle_partition_commits_the_position_behind_records_that_nobody_is_given() -> None:
    of = ledger()
    of.deliver(0)
    of.advance(5)
    assert of.watermark == 0
    of.complete(0)
    assert of.watermark == 5
    of.advance(4)
    assert of.watermark == 5


def test_a_fenced_ledger_moves_no_more() -> None:
    of = ledger()
    of.deliver(0)
    of.fence()
    assert not of.complete(0)
    assert of.watermark == 0
    assert of.is_fenced


def test_settling_twice_counts_once() -> None:
    of = ledger()
    of.deliver(0)
    of.deliver(1)
    assert of.complete(1)
    assert not of.complete(1)
    assert of.complete(0)
    assert not of.complete(0)
    assert of.watermark == 2


def test_what_was_never_delivered_cannot_be_settled_and_nothing_is_delivered_twice() -> None:
    of = ledger()
    of.deliver(0)
    with pytest.raises(ValueError, match="offset 1 was never delivered"):
        of.complete(1)
    with pytest.raises(ValueError, match="delivered before"):
        of.deliver(0)


def test_room_shrinks_with_the_span_above_the_oldest_unfinished_offset() -> None:
    of = ledger(max_out_of_order=2)
    for offset in range(3):
        of.deliver(offset)
    assert of.room == 0
    of.complete(2)
    of.complete(1)
    assert of.room == 0
    of.complete(0)
    assert of.room == 3


def test_what_leads_is_the_ready_run_from_the_watermark_and_the_offset_behind_it() -> None:
    of = ledger(3)
    assert of.leading({3}, 10) == ([], 3)
    for offset in (3, 5, 8):
        of.deliver(offset)
    of.advance(12)
    assert of.leading(set(), 10) == ([], 3)
    assert of.leading({5, 8}, 10) == ([], 3)
    assert of.leading({3, 8}, 10) == ([3], 5)
    assert of.leading({3, 5, 8}, 2) == ([3, 5], 8)
    assert of.leading({3, 5, 8}, 10) == ([3, 5, 8], 12)
    for offset in (3, 5, 8):
        of.complete(offset)
    assert of.watermark == 12


@examples(300)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=40), st.randoms())
def test_in_whatever_order_jobs_finish_the_watermark_ends_behind_the_last(gaps: list[int], random: object) -> None:
    of = ledger()
    offsets = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    for offset in offsets:
        of.deliver(offset)
    order = list(offsets)
    random.shuffle(order)  # type: ignore[attr-defined]
    finished: set[int] = set()
    for offset in order:
        of.complete(offset)
        finished.add(offset)
        unfinished = [o for o in offsets if o not in finished]
        assert of.watermark == (unfinished[0] if unfinished else offsets[-1] + 1)
        of.audit()


class LedgerMachine(RuleBasedStateMachine):
    """Against a model that keeps every offset it ever saw."""

    def __init__(self) -> None:
        super().__init__()
        self.of = ledger(7, max_out_of_order=10)
        self.delivered: list[int] = []
        self.finished: set[int] = set()
        self.position = 7
        self.is_fenced = False
        self.fenced_at = 0

    @rule(gap=st.integers(0, 20))
    def deliver(self, gap: int) -> None:
        if self.of.room:
            self.of.deliver(self.position + gap)
            self.delivered.append(self.position + gap)
            self.position += gap + 1

    @precondition(lambda self: self.delivered)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(self.delivered))
        moved = self.of.complete(offset)
        assert moved == (not self.is_fenced and offset not in self.finished)
        if moved:
            self.finished.add(offset)

    @rule(ahead=st.integers(0, 5))
    def advance(self, ahead: int) -> None:
        self.of.advance(self.position + ahead)
        self.position += ahead

    @rule()
    def fence(self) -> None:
        if not self.is_fenced and len(self.delivered) > 5:
            self.is_fenced = True
            self.of.fence()

    @invariant()
    def everything_below_the_watermark_is_finished(self) -> None:
        self.of.audit()
        assert all(o in self.finished for o in self.delivered if o < self.of.watermark)
        unfinished = [o for o in self.delivered if o not in self.finished]
        assert self.of.watermark == (unfinished[0] if unfinished else self.position)
        assert self.of.in_flight == len(unfinished)
        assert sum(o > self.of.watermark for o in self.finished) <= 10


LedgerMachine.TestCase.settings = examples(400, stateful_step_count=40)
TestLedgerMachine = LedgerMachine.TestCase


@pytest.mark.parametrize("seed", range(10))
def test_two_thousand_interleavings_of_two_owners_lose_and_skip_nothing(seed: int) -> None:
    """An owner takes, finishes, commits and is replaced at any moment; the next one starts at what was committed."""
    random = Random(seed)
    for _ in range(2_000):
        end = random.randrange(1, 12)
        committed, finished = 0, set[int]()
        while committed < end:
            owner = ledger(committed, max_out_of_order=random.randrange(1, 5))
            for _ in range(random.randrange(30)):
                step = random.random()
                if step < 0.4 and owner.room and owner.position < end:
                    owner.deliver(owner.position)
                elif step < 0.8 and owner.position > committed:
                    offset = random.randrange(committed, owner.position)
                    owner.complete(offset)
                    finished.add(offset)
                else:
                    committed = owner.watermark
            owner.fence()
            late = range(committed, owner.position)
            assert not any(owner.complete(offset) for offset in late)
        assert finished >= set(range(end))
