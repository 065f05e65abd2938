"""A short drill of each delivery mode, and the checker itself, which must find what is wrong."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from chaos.checker import ANSWER, Expectation, Ledger, broken_promises
from chaos.drill import run_drill
from parts import kafka_node_program
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


@pytest.mark.kafka
@pytest.mark.slow
@pytest.mark.timeout(600)  # well above finish_s, so that a drill that loses a job ends with its report
@pytest.mark.skipif(kafka_node_program() is None, reason="the drill starts and kills its own Apache Kafka node")
@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
async def test_a_short_drill_breaks_no_promise(s3, tmp_path, delivery: str) -> None:
    port = urlsplit(s3.endpoint_url).port
    assert port is not None
    report = await run_drill(tmp_path, s3, port, seed=7, jobs=300, faults=8, delivery=delivery, finish_s=180)
    logs = "".join(f"\n--- {log.name}\n{log.read_text()[-4000:]}" for log in sorted(tmp_path.glob("*.log")))
    assert report["broken_promises"] == [], f"{report}{logs}"
