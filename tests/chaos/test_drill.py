"""A short drill of each delivery mode, and the checker itself, which must find what is wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from chaos.broker_logs import late_in
from chaos.checker import ANSWER, Expectation, Ledger, broken_promises
from chaos.drill import run_drill
from sample_messages import dead_letter, result


def ledger_of(*jobs: str) -> Ledger:
    return Ledger({job: Expectation(frozenset({ANSWER}), "p") for job in jobs})


def test_the_checker_finds_what_is_lost_unknown_repeated_or_wrong() -> None:
    ledger = ledger_of("lost", "twice", "buried", "differs")
    for message in (
        result(job_id="twice", text="p"),
        result(job_id="twice", text="p"),
        result(job_id="differs", text="p1"),
        result(job_id="differs", text="p2"),
        result(job_id="nobody's", text="p"),
        dead_letter(job_id="buried", code="internal"),
    ):
        ledger.see(message)
    report = ledger.check({0: 2})
    assert report["object_replaced_between"] == ["differs"]
    found = {kind: report[kind] for kind in ("lost", "unknown", "wrong", "repeated", "differing", "uncommitted")}
    assert found == {
        "lost": ["lost"],
        "unknown": ["nobody's"],
        "wrong": ["buried"],
        "repeated": ["differs", "twice"],
        "differing": ["differs"],
        "uncommitted": 2,
    }
    assert "repeated" in broken_promises(report, "exactly_once")
    assert "repeated" not in broken_promises(report, "at_least_once")
    assert {"lost", "unknown", "wrong", "differing", "uncommitted"} <= set(broken_promises(report, "at_least_once"))


def test_equal_answers_may_repeat_by_default_and_nothing_else_is_broken() -> None:
    ledger = ledger_of("a")
    for _ in range(2):
        ledger.see(result(job_id="a", text="p"))
    assert broken_promises(ledger.check({0: 0}), "at_least_once") == []


def test_answers_may_differ_only_where_the_input_could_be_replaced() -> None:
    ledger = Ledger({"a": Expectation(frozenset({ANSWER}), "p", is_fixed=False)})
    for text in ("p1", "p2"):
        ledger.see(result(job_id="a", text=text))
    assert broken_promises(ledger.check({0: 0}), "at_least_once") == []
    assert broken_promises(ledger.check({0: 0}), "exactly_once") == ["repeated"]


class Batch:
    """As a log has them: data of a producer's epoch, or the marker that ends its transaction."""

    is_transactional = True

    def __init__(self, epoch: int, *jobs: str, marker: int | None = None, producer: int = 7) -> None:
        self.producer_id, self.producer_epoch, self.is_control_batch = producer, epoch, marker is not None
        self._records = [SimpleNamespace(headers=(), value=json.dumps({"job_id": job}), key=b"") for job in jobs]
        if marker is not None:
            self._records = [SimpleNamespace(headers=(), value=None, key=struct.pack(">hh", 0, marker))]

    def __iter__(self) -> Iterator[SimpleNamespace]:
        return iter(self._records)


def test_a_marker_of_a_later_epoch_tells_of_one_that_the_broker_left_out() -> None:
    committed, aborted = 1, 0
    log = [
        Batch(0, "a"), Batch(0, marker=committed),
        Batch(0, "b", "c"), Batch(4, "other", producer=8),
        Batch(1, "b", "c", "d"), Batch(1, marker=committed), Batch(4, marker=committed, producer=8),
        Batch(1, "e"), Batch(2, marker=aborted), Batch(2, "e"), Batch(2, marker=committed),
    ]  # fmt: skip
    assert late_in(log) == {"b": 1, "c": 1}


def test_what_the_broker_doubled_is_told_apart_and_excuses_no_third_time() -> None:
    ledger = ledger_of("doubled", "tripled")
    for job, times in (("doubled", 2), ("tripled", 3)):
        for _ in range(times):
            ledger.see(result(job_id=job, text="p"))
    ledger.late.update({"doubled": 1, "tripled": 1})
    report = ledger.check({0: 0})
    assert (report["doubled_by_the_broker"], report["repeated"]) == (["doubled"], ["tripled"])


@pytest.mark.kafka
@pytest.mark.slow
@pytest.mark.timeout(600)  # well above finish_s, so that a drill that loses a job ends with its report
@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
async def test_a_short_drill_breaks_no_promise(s3, tmp_path, delivery: str) -> None:
    port = urlsplit(s3.endpoint_url).port
    assert port is not None
    report = await run_drill(tmp_path, s3, port, seed=7, jobs=300, faults=8, delivery=delivery, finish_s=180)
    logs = "".join(f"\n--- {log.name}\n{log.read_text()[-4000:]}" for log in sorted(tmp_path.glob("*.log")))
    assert report["broken_promises"] == [], f"{report}{logs}"
