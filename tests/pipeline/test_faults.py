"""Faults under which nothing can succeed: present until the part works, or until nobody reports them any more."""

from __future__ import annotations

import pytest

from nanovllm.errors import CredentialsRefused
from nanovllm.metrics import Metrics
from nanovllm.pipeline.failure.faults import ActiveFaults
from nanovllm.pipeline.operations.health import Health
from nanovllm.pipeline.operations.log import RepeatedLines


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_fault_is_told_to_health_and_ends_when_its_part_works() -> None:
    health = Health()
    faults = ActiveFaults(health, Metrics(), lapse_s=10)
    faults.report("store", CredentialsRefused("refused"))
    faults.report("broker", CredentialsRefused("refused too"))
    assert faults.are_present
    assert health.systemic == "store: refused; broker: refused too"
    faults.clear("store")
    assert health.systemic == "broker: refused too"
    faults.clear("broker")
    assert not faults.are_present
    assert health.systemic is None


def test_a_cause_that_changes_while_a_fault_lasts_is_logged_and_causes_that_repeat_at_a_falling_rate(
    caplog: pytest.LogCaptureFixture,
) -> None:
    faults = ActiveFaults(Health(), Metrics(), lapse_s=10)
    for cause in ("no address", "no address", "no address", "expired", "expired"):
        faults.report("store", CredentialsRefused(cause))
    assert [line.split("; ")[0] for line in caplog.messages] == ["store: no address", "store: expired"]
    shown = list(filter(RepeatedLines(lambda: 0.0).filter, caplog.records))
    assert len(shown) == 2
    caplog.clear()
    for number in range(1_000):
        faults.report("store", CredentialsRefused("expired" if number % 2 else "no address"))
    shown = list(filter(RepeatedLines(lambda: 0.0).filter, caplog.records))
    assert len(shown) < 25


def test_a_fault_that_nobody_reports_any_more_lapses() -> None:
    clock, health = Clock(), Health()
    faults = ActiveFaults(health, Metrics(), lapse_s=10, clock=clock)
    faults.report("store", CredentialsRefused("refused"))
    clock.now = 9
    assert faults.are_present
    clock.now = 11
    assert not faults.are_present
    faults.observe()
    assert health.systemic is None


def test_the_end_of_a_fault_is_logged_once_also_when_it_lapsed_before(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    faults = ActiveFaults(Health(), Metrics(), lapse_s=10, clock=clock)
    caplog.set_level("INFO", "nanovllm")
    faults.report("store", CredentialsRefused("refused"))
    clock.now = 30
    faults.observe()
    faults.clear("store")
    faults.clear("store")
    assert [record.getMessage() for record in caplog.records if record.levelname == "INFO"] == [
        "store: works again, after 30 s"
    ]
