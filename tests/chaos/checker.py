"""Compares every job that was produced with every result, dead letter and offset."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanovllm.messages.dead_letter import DeadLetter
from nanovllm.messages.result import Result

ANSWER = "answer"


@dataclass(frozen=True)
class Expectation:
    """How a job may end: ``answer`` with this text, or a dead letter with one of these codes.

    ``is_fixed``: its input stays the same, and so must its answer.
    """

    outcomes: frozenset[str]
    text: str | None = None
    is_fixed: bool = True


@dataclass
class Ledger:
    """What was produced, and what a read_committed reader has seen."""

    expected: dict[str, Expectation] = field(default_factory=dict)
    results: dict[str, list[Result]] = field(default_factory=lambda: defaultdict(list))
    dead_letters: dict[str, list[DeadLetter]] = field(default_factory=lambda: defaultdict(list))
    # Published and its offset committed, but behind a transaction that the broker itself never ends; see World.
    held_back: set[str] = field(default_factory=set)
    # Made readable twice by a marker that the broker itself left out; see broker_logs.
    late: Counter[str] = field(default_factory=Counter)

    def see(self, outcome: Result | DeadLetter) -> None:
        if isinstance(outcome, Result):
            self.results[outcome.job_id].append(outcome)
        else:
            self.dead_letters[outcome.job_id or ""].append(outcome)

    @property
    def missing(self) -> list[str]:
        return sorted(self.expected.keys() - self.results.keys() - self.dead_letters.keys())

    def check(self, lags: Mapping[int, int]) -> dict[str, Any]:
        """Counts, and the ids of whatever broke the promise of each mode."""
        seen = self.results.keys() | self.dead_letters.keys()
        return {
            "jobs": len(self.expected),
            "answered": len(self.results),
            "dead_letters": len(self.dead_letters),
            "lost": sorted(set(self.missing) - self.held_back),
            "held_back_by_the_broker": sorted(self.held_back & set(self.missing)),
            "unknown": sorted(seen - self.expected.keys()),
            "wrong": sorted(job for job in seen & self.expected.keys() if not self._is_as_expected(job)),
            "repeated": sorted(job for job in seen if self._times(job) > 1 + self.late[job]),
            "doubled_by_the_broker": sorted(job for job in seen if 1 < self._times(job) <= 1 + self.late[job]),
            "differing": sorted(job for job in seen if not self._is_one_answer(job)),
            "object_replaced_between": sorted(job for job in seen if len(self._answers(job)) > 1),
            "uncommitted": sum(lags.values()),
        }

    def _times(self, job: str) -> int:
        return len(self.results.get(job, ())) + len(self.dead_letters.get(job, ()))

    def _answers(self, job: str) -> set[str]:
        return {result.text or "" for result in self.results.get(job, ())}

    def _is_one_answer(self, job: str) -> bool:
        """One that names an object without saying which version is asked anew of whatever lies there then."""
        expected = self.expected.get(job)
        is_fixed = expected is None or expected.is_fixed
        ids = {result.result_id for result in self.results.get(job, ())}
        return len(ids) <= 1 and (not is_fixed or len(self._answers(job)) <= 1)

    def _is_as_expected(self, job: str) -> bool:
        expected = self.expected[job]
        codes = {letter.code for letter in self.dead_letters.get(job, ())}
        answers = self.results.get(job, ())
        if answers and ANSWER not in expected.outcomes:
            return False
        if expected.text is not None and any(not answer.text.startswith(expected.text) for answer in answers):
            return False
        return codes <= expected.outcomes


def broken_promises(report: Mapping[str, Any], delivery: str) -> list[str]:
    """The kinds of finding that ``delivery`` forbids and ``report`` has."""
    forbidden = ["lost", "unknown", "wrong", "differing", "uncommitted"]
    if delivery == "exactly_once":
        forbidden.append("repeated")
    return [kind for kind in forbidden if report[kind]]
