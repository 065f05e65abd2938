"""Log lines that repeat are shown at a falling rate."""

from __future__ import annotations

import logging

from aiokafka.errors import GroupCoordinatorNotAvailableError

from nanovllm.pipeline.operations.log import AT_MOST, FORGET_S, STARTING_S, RepeatedLines


def line(text: str, level: int = logging.WARNING) -> logging.LogRecord:
    return logging.LogRecord("aiokafka", level, __file__, 1, "%s", (text,), None)


def test_a_line_that_repeats_is_shown_at_a_falling_rate_and_says_how_often_it_came() -> None:
    now = 0.0
    lines = RepeatedLines(lambda: now)
    shown = []
    for _ in range(900):
        now += 0.1
        record = line("no topic")
        if lines.filter(record):
            shown.append(record.getMessage())
    assert len(shown) == 10
    assert shown[-1] == "no topic (512 times so far)"
    now += FORGET_S + 1
    assert lines.filter(line("no topic"))


def test_a_first_start_shows_no_coordinator_that_is_not_there_yet_and_a_lasting_fault_is_shown() -> None:
    now, text = 0.0, f"Group Coordinator Request failed: {GroupCoordinatorNotAvailableError()}"
    lines = RepeatedLines(lambda: now)
    shown = []
    while now < 2 * STARTING_S:
        now += 0.1
        if lines.filter(line(text, logging.ERROR)):
            shown.append(now)
    assert shown[0] > STARTING_S
    assert len(shown) > 1
    now += FORGET_S + 1
    assert not lines.filter(line(text, logging.ERROR))


def test_other_lines_and_those_below_a_warning_are_all_shown() -> None:
    lines = RepeatedLines(lambda: 0.0)
    assert all(lines.filter(line("job", logging.INFO)) for _ in range(10))
    assert all(lines.filter(line(f"job {number}")) for number in range(10 * AT_MOST))
    assert len(lines._seen) == AT_MOST
