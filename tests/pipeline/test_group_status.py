"""The group of the workers as the brokers know it, and ``nanovllm status``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from bench import Bench, GatedEngine, answered, reached
from typer.testing import CliRunner

from nanovllm.cli.main import app
from nanovllm.client.group_status import GroupRates, GroupStatus, PartitionStatus, read_group


def group(*partitions: tuple[int, int], at: float = 0.0) -> GroupStatus:
    """A group with partitions of one topic that are finished up to the first, and end at the second number."""
    statuses = [PartitionStatus("jobs", number, *one, None) for number, one in enumerate(partitions)]
    return GroupStatus("g", "Stable", tuple(statuses), (), at)


def test_rates_are_those_between_two_readings_and_say_when_the_lag_is_worked_off() -> None:
    rates = GroupRates.between(group((0, 100), (5, 10)), group((60, 120), (15, 20), at=10.0))
    assert (rates.written, rates.finished) == (3.0, 7.0)
    assert rates.seconds_left(100) == 25.0
    assert rates.seconds_left(0) == 0.0
    assert GroupRates(written=5.0, finished=5.0).seconds_left(1) is None


def test_a_partition_that_is_new_is_in_no_rate_and_a_topic_made_anew_gives_no_negative_one() -> None:
    rates = GroupRates.between(group((90, 100)), group((0, 3), (7, 50), at=1.0))
    assert (rates.written, rates.finished) == (0.0, 0.0)


async def check_group(bench: Bench) -> None:
    topics = [bench.settings.topics.jobs, "no-such-topic"]
    await bench.send(*({"job_id": f"j{number}", "prompt": "a"} for number in range(3)))
    untouched = await read_group(bench.settings.kafka, topics)
    assert (untouched.members, untouched.lag) == ((), 3)
    engine = GatedEngine()
    async with engine, bench.working(engine):
        await engine.submitted("j0", "j1", "j2")
        engine.open("j0")
        await answered(bench, {"j0"})
        assert bench.source is not None
        await bench.source.commit()
        working = await read_group(bench.settings.kafka, topics)
        assert [member.partitions for member in working.members] == [2]
        assert working.members[0].client_id == bench.settings.kafka.client_id
        assert {one.client_id for one in working.partitions} == {bench.settings.kafka.client_id}
        assert [(one.finished, one.end) for one in working.partitions] == [(1, 3), (0, 0)]
        engine.open("j1", "j2")
        await answered(bench, {"j0", "j1", "j2"})
    assert await reached(bench, 3)
    assert (await read_group(bench.settings.kafka, topics)).lag == 0


@pytest.mark.kafka
async def test_apache_kafka_tells_lag_members_and_what_they_have(kafka_bench: Bench) -> None:
    await check_group(kafka_bench)


def run(bench_environment: dict[str, str], *options: str) -> Any:
    return CliRunner().invoke(app, ["status", "--interval", "0.1", *options], env=bench_environment)


@pytest.mark.kafka
async def test_the_command_shows_people_a_table_and_programs_an_object(
    kafka_bench: Bench, unique: Callable[[str], str]
) -> None:
    await kafka_bench.send({"job_id": "a", "prompt": "b"})
    environment = kafka_bench.environment | {"NANOVLLM_KAFKA__GROUP_ID": unique("status")}
    shown = await asyncio.to_thread(run, environment)
    assert shown.exit_code == 0, shown.output
    assert "0 workers, 1 record not finished, 0.0 written and 0.0 finished a second" in shown.output
    assert "the lag does not shrink" in shown.output
    told = json.loads((await asyncio.to_thread(run, environment, "--json")).stdout)
    assert (told["lag"], told["seconds_left"], told["workers"]) == (1, None, [])
    assert [one["lag"] for one in told["partitions"]] == [1, 0]
