"""kill -9 of workers while documents are half gathered: one record a version, no finished page twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos.document_drill import broken_promises, computed_again, run_document_drill
from chaos.killed_worker import KEPT, LOOKED, MISSED
from document_world import DocumentWorld

MODES = ["exactly_once", "at_least_once"]


def test_a_page_was_computed_again_where_it_was_kept_before_it_was_looked_for() -> None:
    of_two = [["1", LOOKED, "a"], ["2", LOOKED, "a"], ["1", MISSED, "a"], ["1", KEPT, "a"], ["2", MISSED, "a"]]
    assert computed_again(of_two) == set()
    assert computed_again([*of_two, ["2", LOOKED, "a"]]) == set()
    assert computed_again([*of_two, ["2", LOOKED, "a"], ["2", MISSED, "a"]]) == {"a"}


@pytest.mark.kafka
@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize("delivery", MODES)
async def test_documents_survive_kills(kafka_broker, tmp_path, delivery: str) -> None:
    await survives(kafka_broker, tmp_path, delivery, seed=1, kills=3)


@pytest.mark.kafka
@pytest.mark.s3
@pytest.mark.proof
@pytest.mark.parametrize("seed", range(2, 12))
@pytest.mark.parametrize("delivery", MODES)
async def test_documents_survive_kills_of_many_seeds(kafka_broker, tmp_path, delivery: str, seed: int) -> None:
    await survives(kafka_broker, tmp_path, delivery, seed=seed, kills=7)


async def survives(kafka_broker: str, directory: Path, delivery: str, *, seed: int, kills: int) -> None:
    async with DocumentWorld.on(kafka_broker, directory, {}) as documents:
        report = await run_document_drill(documents, seed=seed, delivery=delivery, kills=kills)
    assert broken_promises(report) == [], report
    assert sum(report["kills"].values()) >= kills, report
    assert set(report["exit_codes"]) == {-9}, report
