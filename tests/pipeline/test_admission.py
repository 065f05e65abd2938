"""Admission: a bound on jobs and bytes that cannot deadlock."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.metrics import Metrics
from nanovllm.objects.fetch import ObjectFetcher
from nanovllm.pipeline.admission.admission import Admission
from nanovllm.pipeline.build import Parts, build_worker
from nanovllm.pipeline.operations.health import Health
from nanovllm.settings.worker import Settings
from nanovllm.sinks.outcomes import OutcomeSink


def admission(*, max_jobs: int = 4, max_bytes: int = 100) -> Admission:
    return Admission(max_jobs=max_jobs, max_bytes=max_bytes)


async def started(*coroutines: object) -> list[asyncio.Task[None]]:
    tasks = [asyncio.ensure_future(c) for c in coroutines]  # type: ignore[call-overload]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def test_room_is_what_is_left_of_the_jobs() -> None:
    of = admission(max_jobs=2)
    first, second = of.admit(1), of.admit(1)
    assert of.room == 0
    first.release()
    assert of.room == 1
    second.release()
    second.release()
    assert (of.room, of.jobs, of.bytes) == (2, 0, 0)
    of.audit()


def test_there_is_no_room_while_records_hold_all_the_bytes() -> None:
    of = admission(max_bytes=100)
    reservation = of.admit(100)
    assert of.room == 0
    reservation.release()
    assert of.room == 4


async def test_a_reservation_waits_until_its_bytes_are_free() -> None:
    of = admission()
    first, second = of.admit(0), of.admit(0)
    await first.acquire_bytes(70)
    (waiting,) = await started(second.acquire_bytes(40))
    assert not waiting.done()
    first.resize(60)
    await waiting
    assert of.bytes == 100


async def test_reservations_are_granted_first_come_first_served() -> None:
    of = admission()
    holder, large, small = of.admit(0), of.admit(0), of.admit(0)
    await holder.acquire_bytes(50)
    waiting_large, waiting_small = await started(large.acquire_bytes(60), small.acquire_bytes(10))
    assert not waiting_small.done(), "the small one fits, and would starve the large one for ever"
    holder.release()
    await waiting_large
    await waiting_small


async def test_more_than_the_whole_bound_is_granted_alone() -> None:
    of = admission(max_bytes=100)
    small, huge, later = of.admit(0), of.admit(0), of.admit(0)
    await small.acquire_bytes(10)
    waiting_huge, waiting_later = await started(huge.acquire_bytes(500), later.acquire_bytes(10))
    assert not waiting_huge.done()
    small.release()
    await waiting_huge
    await started()
    assert not waiting_later.done()
    huge.resize(20)
    await waiting_later


async def test_a_cancelled_wait_holds_nothing_and_lets_the_next_one_pass() -> None:
    of = admission()
    holder, cancelled, follower = of.admit(0), of.admit(0), of.admit(0)
    await holder.acquire_bytes(90)
    waiting, behind = await started(cancelled.acquire_bytes(80), follower.acquire_bytes(10))
    waiting.cancel()
    await behind
    assert of.bytes == 100
    for reservation in (holder, cancelled, follower):
        reservation.release()
    of.audit()
    assert of.bytes == 0


async def test_cancelled_in_the_step_in_which_it_was_granted_holds_nothing() -> None:
    of = admission()
    holder, unlucky = of.admit(0), of.admit(0)
    await holder.acquire_bytes(90)
    (waiting,) = await started(unlucky.acquire_bytes(80))
    holder.release()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    unlucky.release()
    of.audit()
    assert (of.bytes, of.jobs) == (0, 0)


async def test_a_job_reserves_all_its_bytes_at_once() -> None:
    reservation = admission().admit(0)
    await reservation.acquire_bytes(1)
    with pytest.raises(RuntimeError, match="all its bytes at once"):
        await reservation.acquire_bytes(1)


async def test_waiting_for_room_ends_when_a_job_ends_or_time_is_up() -> None:
    of = admission(max_jobs=1)
    reservation = of.admit(0)
    assert not await of.wait_for_room(0.01)
    (waiting,) = await started(of.wait_for_room(30))
    reservation.release()
    assert await waiting


async def test_what_a_job_turns_out_to_hold_is_charged_even_above_its_reservation() -> None:
    of = admission(max_bytes=100)
    reservation = of.admit(10)
    await reservation.acquire_bytes(20)
    reservation.resize(120)
    assert (of.bytes, of.room) == (130, 0)
    reservation.release()
    assert of.bytes == 0
    of.audit()


async def test_an_output_that_waits_holds_its_bytes_and_not_the_jobs_place() -> None:
    of = admission(max_jobs=1, max_bytes=100)
    reservation, behind = of.admit(10), of.admit(0)
    await reservation.acquire_bytes(80)
    (waiting,) = await started(behind.acquire_bytes(60))
    reservation.release_slot(30)
    await waiting
    assert (of.jobs, of.bytes) == (1, 90)
    reservation.release_slot(5)
    reservation.release()
    assert (of.jobs, of.bytes) == (1, 60)
    behind.release()
    of.audit()


@pytest.mark.parametrize(
    ("settings", "seats", "jobs"),
    [
        ({}, 256, 512),  # what a large GPU runs at once, though no setting says so
        ({}, 8, 16),
        ({"admission": {"max_jobs": 40}}, 256, 40),
        ({"topics": {"lanes": {f"lane-{number}": number for number in range(1, 31)}}}, 8, 31),  # a place for each
    ],
)
async def test_a_worker_admits_twice_what_its_engine_runs_at_once(
    settings: dict[str, Any], seats: int, jobs: int
) -> None:
    effective = Settings.model_validate(settings)
    engine, fetcher = EchoEngine(max_num_seqs=seats), ObjectFetcher(effective.s3, max_bytes=1)
    sink = OutcomeSink(effective.topics, lambda *_: None, lambda *_: None)
    worker = build_worker(effective, Parts(engine, None, fetcher), sink, Metrics(), Health(), routes=None)
    places = 0
    while worker.admission.room:
        lane = max(worker.admission.rooms, key=lambda lane: worker.admission.rooms[lane])
        worker.admission.admit(1, lane)
        places += 1
    assert places == jobs
