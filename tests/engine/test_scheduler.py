"""The scheduler and its blocks without a model: budgets, prefixes, preemption."""

from __future__ import annotations

from typing import Any

import pytest

from nanovllm.engine.scheduling.batch import ScheduledBatch
from nanovllm.engine.scheduling.block_manager import BlockManager
from nanovllm.engine.scheduling.scheduler import Scheduler
from nanovllm.engine.scheduling.sequence import ImageSpan, Sequence
from nanovllm.errors import EngineFault
from nanovllm.sampling_params import SamplingParams

SIZE = 4


def make_scheduler(num_blocks: int = 16, *, max_num_seqs: int = 8, budget: int = 64, **options: Any) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, SIZE, **options), max_num_seqs=max_num_seqs, max_num_batched_tokens=budget
    )


def make_sequence(tokens: list[int], *, max_tokens: int = 4, name: str = "", **options: Any) -> Sequence:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Sequence(name, list(tokens), len(tokens), sampling, max_tokens, **options)


def run(scheduler: Scheduler, token: int = 7) -> ScheduledBatch:
    """One step with a model that always answers ``token``."""
    scheduled = scheduler.schedule()
    assert sum(row.num_tokens for row in scheduled.rows) <= scheduler.max_num_batched_tokens
    assert len({id(row.sequence) for row in scheduled.rows}) == len(scheduled.rows)
    for row in scheduled.rows:
        assert row.num_tokens > 0
        assert len(row.sequence.block_table) * SIZE >= row.end
        samples = row.is_sampled
        scheduler.commit(row)
        if samples:
            row.sequence.token_ids.append(token)
            if row.sequence.num_output_tokens == row.sequence.max_tokens:
                scheduler.finish(row.sequence)
    scheduler.audit()
    return scheduled


def finish_all(scheduler: Scheduler) -> None:
    while scheduler.has_unfinished():
        assert run(scheduler).rows


def test_a_long_prompt_is_spread_over_steps_beside_running_ones() -> None:
    scheduler = make_scheduler(budget=10)
    short, long = make_sequence([1, 2, 3]), make_sequence(list(range(20)))
    scheduler.add(short)
    scheduler.add(long)
    assert [row.num_tokens for row in run(scheduler).rows] == [3, 7]
    assert [row.num_tokens for row in run(scheduler).rows] == [1, 9]
    assert [row.num_tokens for row in run(scheduler).rows] == [1, 4]


def test_a_fully_cached_prompt_still_computes_its_last_block() -> None:
    scheduler = make_scheduler()
    for _ in range(2):
        scheduler.add(make_sequence(list(range(8)), max_tokens=1))
        scheduled = run(scheduler)
    assert [(row.start, row.num_tokens) for row in scheduled.rows] == [(4, 4)]


@pytest.mark.parametrize("length", [7, 8, 9])
def test_prompts_around_a_block_border_take_the_blocks_they_need(length: int) -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(list(range(length)), max_tokens=3)
    scheduler.add(sequence)
    run(scheduler)
    assert len(sequence.block_table) == -(-length // SIZE)
    run(scheduler)
    assert len(sequence.block_table) == -(-(length + 1) // SIZE)
    finish_all(scheduler)
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks


def test_equal_prompts_in_one_step_are_computed_once() -> None:
    scheduler = make_scheduler()
    twins = [make_sequence(list(range(9))) for _ in range(3)]
    for twin in twins:
        scheduler.add(twin)
    assert [row.num_tokens for row in run(scheduler).rows] == [9]
    assert [row.num_tokens for row in run(scheduler).rows] == [1, 1, 1]
    assert {tuple(twin.block_table[:2]) for twin in twins} == {tuple(twins[0].block_table[:2])}


def test_of_many_followers_of_one_leader_a_step_looks_at_as_many_as_there_are_seats() -> None:
    scheduler = make_scheduler(64, max_num_seqs=3, budget=16)
    leader, *followers = (make_sequence([*range(40), 100 + number]) for number in range(20))
    for sequence in (leader, *followers):
        scheduler.add(sequence)
    for _ in range(3):  # the last one leaves room in its budget
        run(scheduler)
    assert scheduler.running == [leader]
    assert [bool(sequence._block_hashes) for sequence in followers] == [True] * 3 + [False] * 16
    finish_all(scheduler)
    assert all(sequence.num_cached_tokens == 40 for sequence in followers)


def test_followers_do_not_wait_for_a_leader_that_was_aborted() -> None:
    scheduler = make_scheduler(budget=4)
    leader, follower = make_sequence(list(range(12))), make_sequence(list(range(12)))
    scheduler.add(leader)
    scheduler.add(follower)
    assert [row.sequence for row in run(scheduler).rows] == [leader]
    scheduler.finish(leader)
    scheduled = run(scheduler)
    assert [(row.sequence, row.start) for row in scheduled.rows] == [(follower, 4)]


def test_equal_prompts_without_a_prefix_cache_share_nothing() -> None:
    scheduler = make_scheduler(enable_prefix_caching=False)
    for _ in range(2):
        scheduler.add(make_sequence(list(range(9))))
    assert [row.num_tokens for row in run(scheduler).rows] == [9, 9]
    finish_all(scheduler)


def test_a_preempted_sequence_meets_its_own_blocks_again() -> None:
    scheduler = make_scheduler(num_blocks=6)
    first, second = make_sequence(list(range(8)), max_tokens=9), make_sequence(list(range(50, 58)), max_tokens=9)
    scheduler.add(first)
    scheduler.add(second)
    while not scheduler.num_preemptions:
        run(scheduler)
    assert second in scheduler.waiting
    length = len(second)
    while second in scheduler.waiting:
        scheduled = run(scheduler)
    row = next(row for row in scheduled.rows if row.sequence is second)
    assert row.start > 0
    assert row.end == length
    finish_all(scheduler)


def test_a_lower_priority_number_goes_first_and_is_preempted_last() -> None:
    scheduler = make_scheduler(num_blocks=4, max_num_seqs=2)
    late = make_sequence(list(range(8)), max_tokens=9, priority=5)
    urgent = make_sequence(list(range(20, 27)), max_tokens=9, priority=-1)
    scheduler.add(late)
    scheduler.add(urgent)
    assert [row.sequence for row in run(scheduler).rows] == [urgent, late]
    while not scheduler.num_preemptions:
        run(scheduler)
    assert late in scheduler.waiting
    finish_all(scheduler)


def test_an_endless_stream_of_urgent_requests_starves_nobody() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    patient = make_sequence([1, 2, 3], max_tokens=1, priority=1, arrival=0)
    scheduler.add(patient)
    for arrival in range(1, 1001):
        scheduler.add(make_sequence([4, 5], max_tokens=1, arrival=arrival))
        run(scheduler)
        assert patient in scheduler.waiting
    scheduler.add(make_sequence([4, 5], max_tokens=1, arrival=1001))
    run(scheduler)
    assert patient.is_finished


def test_nobody_overtakes_a_sequence_that_waits_for_blocks() -> None:
    scheduler = make_scheduler(num_blocks=4)
    scheduler.add(make_sequence(list(range(9)), max_tokens=2))
    run(scheduler)
    large, small = make_sequence(list(range(30, 40))), make_sequence([90])
    scheduler.add(large)
    scheduler.add(small)
    run(scheduler)
    assert scheduler.waiting == [large, small]


def test_blocks_that_are_held_are_never_evicted() -> None:
    scheduler = make_scheduler(num_blocks=8)
    holder = make_sequence(list(range(12)), max_tokens=20)
    scheduler.add(holder)
    run(scheduler)
    held = list(holder.block_table)
    for start in range(100, 130, 10):
        scheduler.add(make_sequence(list(range(start, start + 10)), max_tokens=1))
        run(scheduler)
    assert holder.block_table[: len(held)] == held
    twin = make_sequence(list(range(12)), max_tokens=1)
    scheduler.add(twin)
    run(scheduler)
    assert twin.num_cached_tokens == 8


def test_the_longest_unused_prefix_is_evicted_first_and_from_its_end() -> None:
    blocks = BlockManager(4, SIZE)
    old, new = make_sequence(list(range(8))), make_sequence(list(range(50, 58)))
    for sequence in (old, new):
        table = blocks.allocate(2)
        for block, key in zip(table, sequence.block_hashes(SIZE), strict=True):
            blocks.cache_block(block, key)
        blocks.free(table)
    blocks.allocate(1)
    assert len(blocks.match_prefix(old.block_hashes(SIZE))) == 1
    assert len(blocks.match_prefix(new.block_hashes(SIZE))) == 2


def test_taking_more_blocks_than_are_free_changes_nothing() -> None:
    blocks = BlockManager(4, SIZE)
    table = blocks.allocate(3)
    with pytest.raises(EngineFault, match="2 blocks wanted, 1 of 4"):
        blocks.allocate(2)
    blocks.audit([table])


class _Picture:
    """Stands where a PreparedImage would: hashing looks only at the key."""


def with_image(key: bytes, start: int, salt: bytes = b"") -> list[bytes]:
    span = ImageSpan(_Picture(), key, start, 6)  # type: ignore[arg-type]
    return make_sequence([1] * 16, images=(span,), cache_salt=salt).block_hashes(SIZE)


def test_block_hashes_tell_images_offsets_and_salts_apart() -> None:
    base = with_image(b"a" * 32, 6)
    other, moved, salted = with_image(b"b" * 32, 6), with_image(b"a" * 32, 7), with_image(b"a" * 32, 6, b"tenant")
    assert base == with_image(b"a" * 32, 6)
    assert base[0] == other[0] == moved[0] != salted[0]
    assert all(8 * len(key) >= 128 for key in base)
    assert all(len({base[n], other[n], moved[n], salted[n]}) == 4 for n in (1, 2, 3))
