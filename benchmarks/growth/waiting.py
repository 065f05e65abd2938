"""A scheduler's step against the sequences that wait."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.growth.tree import Row, find, make_sequence, method, once, rows_of

SEATS, STEP_TOKENS = 64, 512
PROMPT_TOKENS, COMMON_TOKENS = 1_000, 960


def measure(is_tiny: bool) -> list[Row]:
    """Seats all taken, a common prefix being computed, blocks short, and aborts."""
    many = (10, 100) if is_tiny else (100, 1_000, 10_000, 100_000)
    some = (10, 100) if is_tiny else (100, 1_000, 10_000)
    return [
        *rows_of(_seats_taken, "waiting", many),
        *rows_of(_common_prefix, "waiting", some),
        *rows_of(_aborts, "waiting", some),
    ]


def _seats_taken(waiting: int) -> dict[tuple[str, str], float]:
    scheduler = _scheduler(1 << 14)
    sequences = [_sequence(number, 64) for number in range(waiting)]
    adding = once(lambda: [scheduler.add(one) for one in sequences])
    for _ in range(12):
        _step(scheduler)
    short = _scheduler(64)
    for number in range(waiting):
        short.add(_sequence(number, 512))
    for _ in range(6):
        _step(short)
    return {
        ("schedule, all seats taken", "µs"): 1e6 * min(_step(scheduler) for _ in range(5)),
        ("schedule, blocks short", "µs"): 1e6 * min(_step(short) for _ in range(3)),
        ("a request queued", "µs"): 1e6 * adding / waiting,
    }


def _common_prefix(waiting: int) -> dict[tuple[str, str], float]:
    scheduler = _scheduler(1 << 16)
    for number in range(waiting):
        scheduler.add(_sequence(number, PROMPT_TOKENS, COMMON_TOKENS))
    steps = [_step(scheduler) for _ in range(5)]
    return {("schedule, the longest of 5 steps while 960 common tokens are computed", "ms"): 1e3 * max(steps)}


def _aborts(waiting: int) -> dict[tuple[str, str], float]:
    scheduler = _scheduler(1 << 12)
    sequences = [_sequence(number, 64) for number in range(waiting)]
    for one in sequences:
        scheduler.add(one)
    return {
        ("a waiting request aborted", "µs"): 1e6
        * once(lambda: [scheduler.finish(one) for one in reversed(sequences)])
        / waiting
    }


def _sequence(number: int, length: int, common: int = 0) -> Any:
    own = [(number * 7919 + place) % 50_000 for place in range(length - common)]
    return make_sequence(f"{number}", [*range(common), *own], length, 64)


def _scheduler(blocks: int) -> Any:
    BlockManager = find("engine.scheduling.block_manager:BlockManager", "engine.block_manager:BlockManager")
    Scheduler = find("engine.scheduling.scheduler:Scheduler", "engine.scheduler:Scheduler")
    return Scheduler(BlockManager(blocks, 16), max_num_seqs=SEATS, max_num_batched_tokens=STEP_TOKENS)


def _step(scheduler: Any) -> float:
    """Seconds of scheduling a step that is then committed as if every row had sampled a token."""
    began = time.perf_counter()
    scheduled = method(scheduler, "schedule", "plan")()
    took = time.perf_counter() - began
    for row in scheduled.rows:
        if method(row, "is_sampled", "samples"):
            row.sequence.token_ids.append(1)
        scheduler.commit(row)
    return took
