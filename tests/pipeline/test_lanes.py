"""Topics of jobs with priorities: the urgent ones are never kept out, and the others never starve."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from bench import Bench, FaultyFetcher, GatedEngine, eventually, job_id_of, png, reached
from hypothesis import given
from hypothesis import strategies as st
from parts import create_topic
from pydantic import ValidationError

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import FetchFailed
from nanovllm.pipeline.admission.admission import Admission
from nanovllm.pipeline.admission.engine_queue import EngineQueue, QueuedJob
from nanovllm.pipeline.admission.lanes import OVERTAKEN_AT_MOST, LaneTurns
from nanovllm.pipeline.admission.tenant_shares import FairShares
from nanovllm.pipeline.topic_checks import implied_acls, topic_needs
from nanovllm.settings.worker import Settings

URGENT, BULK = -10, 10


@pytest.fixture
async def laned(bench: Bench, unique: Callable[[str], str]) -> Bench:
    """A bench with an urgent lane of one partition."""
    urgent = unique("urgent")
    await create_topic(bench.bootstrap_servers, urgent, partitions=1)
    topics = bench.settings.topics.model_copy(update={"lanes": {urgent: URGENT}})
    bench.settings = bench.settings.model_copy(update={"topics": topics})
    return bench


def urgent_topic(bench: Bench) -> str:
    return next(iter(bench.settings.topics.lanes))


async def send_urgent(bench: Bench, *jobs: dict[str, object]) -> None:
    for job in jobs:
        await bench.producer.send_and_wait(urgent_topic(bench), json.dumps(job).encode())


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
async def test_an_urgent_job_does_not_wait_behind_a_full_window_of_others(laned: Bench, delivery: str) -> None:
    engine = GatedEngine(max_num_seqs=64)
    await laned.send(*({"job_id": f"j{i}", "prompt": "p"} for i in range(60)))
    async with laned.working(engine, delivery=delivery):
        # 16 places, an eighth of them kept: no more of the others come, whatever the topic holds.
        await engine.submitted(*(f"j{i}" for i in range(14)))
        await send_urgent(laned, {"job_id": "urgent", "prompt": "p"})
        await engine.submitted("urgent")
        assert "j14" not in {job_id_of(request) for request in engine.requests}
        engine.open("urgent")
        assert set(await laned.results(1)) == {"urgent"}
        engine.open(*(f"j{i}" for i in range(60)))
        assert len(await laned.results(61)) == 61


async def test_other_jobs_pass_while_urgent_ones_fill_all_that_they_may(laned: Bench) -> None:
    engine = GatedEngine(max_num_seqs=64)
    await send_urgent(laned, *({"job_id": f"u{i}", "prompt": "p"} for i in range(60)))
    await laned.send({"job_id": "ordinary", "prompt": "p"})
    async with laned.working(engine):
        await engine.submitted("ordinary", *(f"u{i}" for i in range(14)))
        engine.open("ordinary", *(f"u{i}" for i in range(60)))
        assert len(await laned.results(61)) == 61


async def test_an_urgent_job_that_is_tried_again_later_stays_in_its_lane(
    laned: Bench, images: Callable[[str, bytes], str]
) -> None:
    retries = laned.settings.retries.model_copy(update={"delays_s": (1,)})
    tiers = [f"{topic}.retry-1s" for topic in laned.settings.topics.job_topics]
    await create_topic(laned.bootstrap_servers, *tiers, partitions=1)
    s3 = laned.settings.s3.model_copy(update={"max_attempts": 1})
    fetcher = FaultyFetcher(laned.settings, FetchFailed("not now"), failures=1)
    await send_urgent(laned, {"job_id": "again", "prompt": "<|image|>", "images": [images("again.png", png())]})
    async with laned.working(EchoEngine(), fetcher, retries=retries, s3=s3):
        waiting = await laned.read(f"{urgent_topic(laned)}.retry-1s", 1)
        assert dict(waiting[0].headers)["nanovllm_source_topic"].decode() == urgent_topic(laned)
        assert set(await laned.results(1)) == {"again"}


async def test_the_engine_gets_urgent_jobs_first_and_now_and_then_another() -> None:
    engine_queue = EngineQueue(1, FairShares())
    began: list[str] = []

    async def run(name: str, lane: int) -> None:
        async with engine_queue.slot(QueuedJob(1, priority=0 if lane == URGENT else -1000, lane=lane)):
            began.append(name)

    async with engine_queue.slot(QueuedJob(0)):
        names = [(f"ordinary-{n}", 0) for n in range(3)] + [(f"urgent-{n}", URGENT) for n in range(20)]
        tasks = [asyncio.create_task(run(*name)) for name in names]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert began[0] == "urgent-0", "a lane comes before the priority that a job asks for"
    assert [began.index(f"ordinary-{n}") for n in range(3)] == [7, 15, 22]


@given(st.lists(st.sets(st.sampled_from([-1, 0, 1]), min_size=1), max_size=200))
def test_no_lane_that_waits_is_overtaken_for_ever(rounds: list[set[int]]) -> None:
    turns = LaneTurns()
    overtaken = {-1: 0, 0: 0, 1: 0}
    for waiting in rounds:
        lane = turns.next(waiting)
        assert lane in waiting
        turns.serve(lane, waiting)
        for other in waiting:
            overtaken[other] += 1
        overtaken[lane] = 0
        # Two lanes may be owed a turn at once.
        assert max(overtaken.values()) <= OVERTAKEN_AT_MOST + 2


async def test_bytes_are_kept_for_each_lane_too() -> None:
    of = Admission(max_jobs=16, max_bytes=800, lanes=(URGENT, 0))
    ordinary = of.admit(0, 0)
    await ordinary.acquire_bytes(650)
    waiting = asyncio.ensure_future(of.admit(0, 0).acquire_bytes(100))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert of.rooms[URGENT] > 0
    await asyncio.wait_for(of.admit(0, URGENT).acquire_bytes(100), 60)
    of.audit()
    ordinary.release()
    await asyncio.wait_for(waiting, 60)
    of.audit()


async def test_a_reservation_that_is_granted_alone_is_not_overtaken_for_ever() -> None:
    of = Admission(max_jobs=64, max_bytes=800, lanes=(URGENT, 0))
    held = of.admit(0, URGENT)
    await held.acquire_bytes(10)
    huge = asyncio.ensure_future(of.admit(0, 0).acquire_bytes(900))
    await asyncio.sleep(0)
    for _ in range(30):
        # Each comes before the one before has gone, so that some reservation is always held.
        reservation = of.admit(0, URGENT)
        asking = asyncio.ensure_future(reservation.acquire_bytes(10))
        await asyncio.sleep(0)
        if not asking.done():
            break
        held.release()
        held = reservation
    held.release()
    await asyncio.wait_for(huge, 60)
    asking.cancel()


@pytest.mark.parametrize(
    "wrong",
    [
        {"topics": {"lanes": {"nanovllm.results": 1}}},
        {"topics": {"lanes": {"nanovllm.jobs": 1}}},
        {"topics": {"lanes": {"a": 1, "b": 2}}, "admission": {"max_jobs": 2}},
    ],
)
def test_lanes_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="lanes"):
        Settings.model_validate(wrong)


def test_a_lane_implies_its_topics_and_rights() -> None:
    settings = Settings.model_validate({"topics": {"lanes": {"fast": -1}}, "retries": {"delays_s": (60,)}})
    purposes = {need.name: need.purpose for need in topic_needs(settings)}
    assert purposes["fast"] == "jobs"
    assert purposes["fast.retry-60s"] == "retry"
    assert ("TOPIC", "fast", "LITERAL", "READ") in implied_acls(settings)


async def test_the_lag_of_a_lane_is_shown_and_its_offsets_are_committed(laned: Bench) -> None:
    await send_urgent(laned, {"job_id": "u", "prompt": "p"})
    await laned.send({"job_id": "o", "prompt": "p"})
    async with laned.working(EchoEngine()):
        assert set(await laned.results(2)) == {"u", "o"}
        await eventually(lambda: reached(laned, 1))
        labels = {"topic": urgent_topic(laned), "partition": "0"}
        await eventually(
            lambda: (
                laned.metrics.registry.get_sample_value("nanovllm_consumer_lag_records", labels) == 0
                and laned.metrics.registry.get_sample_value(
                    "nanovllm_messaging_client_consumed_messages_total", {"topic": labels["topic"]}
                )
                == 1
            )
        )
