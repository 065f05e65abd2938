"""Log lines: those that repeat are shown at a falling rate; in JSON each is an object with its job."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
from datetime import datetime

import pytest
from aiokafka.errors import GroupCoordinatorNotAvailableError

from nanovllm.pipeline.operations.log import AT_MOST, FORGET_S, STARTING_S, RepeatedLines, log_fields, log_to_stderr


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


async def test_a_line_in_json_is_an_object_with_the_job_that_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    log_to_stderr("info", "json", "worker-1")
    logger = logging.getLogger("nanovllm.worker")

    async def work() -> None:
        logger.info('read "%s"', "two\nlines")
        try:
            raise ValueError("ü")
        except ValueError:
            logger.exception("failed")

    with log_fields("j-1", "jobs", 3, 17):
        task = asyncio.create_task(work())
    logger.info("of none")
    await task
    none, read, failed = map(json.loads, written.getvalue().splitlines())
    job = {"job_id": "j-1", "topic": "jobs", "partition": 3, "offset": 17}
    common = {"logger": "nanovllm.worker", "worker_id": "worker-1"}
    assert datetime.fromisoformat(none.pop("time")).tzinfo is not None
    assert none == common | {"level": "info", "message": "of none"}
    del read["time"]
    assert read == common | job | {"level": "info", "message": 'read "two\nlines"'}
    assert failed.items() >= (common | job | {"level": "error", "message": "failed"}).items()
    assert failed["exception"].endswith("ValueError: ü")


def test_a_line_in_text_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    log_to_stderr("info")
    with log_fields("j-1", "jobs", 3, 17):
        logging.getLogger("nanovllm.worker").info("of a job")
    assert written.getvalue().endswith(" INFO nanovllm.worker: of a job\n")
