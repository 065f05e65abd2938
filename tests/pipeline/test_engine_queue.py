"""Who goes next: priorities, deadlines, tenants and their rates."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bench import Bench, GatedEngine, eventually, job_id_of, reached
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.pipeline.admission.engine_queue import EngineQueue, QueuedJob
from nanovllm.pipeline.admission.tenant_shares import MAX_REMEMBERED, FairShares, TokenRates
from nanovllm.settings.tenants import TenantSettings
from nanovllm.settings.worker import Settings

SOON = datetime(2030, 1, 1, tzinfo=UTC)
LATER = datetime(2030, 1, 2, tzinfo=UTC)


async def order_of(queued_jobs: dict[str, QueuedJob], *, weights: dict[str, float] | None = None) -> list[str]:
    """In which order ``queued_jobs`` get the one place, all of them waiting for it."""
    engine_queue = EngineQueue(1, FairShares(weights))
    began: list[str] = []

    async def run(name: str, queued: QueuedJob) -> None:
        async with engine_queue.slot(queued):
            began.append(name)
            await asyncio.sleep(0)

    async with engine_queue.slot(QueuedJob(0, tenant="first")):
        tasks = [asyncio.create_task(run(name, queued)) for name, queued in queued_jobs.items()]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    return began


async def test_when_all_are_cancelled_at_once_no_place_is_handed_to_one_of_them() -> None:
    engine_queue = EngineQueue(1, FairShares())

    async def run(seconds: float) -> None:
        async with engine_queue.slot(QueuedJob(1)):
            await asyncio.sleep(seconds)

    tasks = [asyncio.create_task(run(60)) for _ in range(3)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(error) for error in ended] == [asyncio.CancelledError] * 3
    assert not engine_queue._waiting
    async with asyncio.timeout(60):
        await run(0)


async def test_lower_priority_first_then_the_earliest_deadline_then_who_came_first() -> None:
    queued_jobs = {
        "idle": QueuedJob(1, priority=9, deadline=SOON),
        "no-deadline-1": QueuedJob(1),
        "later": QueuedJob(1, deadline=LATER),
        "no-deadline-2": QueuedJob(1),
        "soon": QueuedJob(1, deadline=SOON),
        "urgent": QueuedJob(1, priority=-1),
    }
    assert await order_of(queued_jobs) == ["urgent", "soon", "later", "no-deadline-1", "no-deadline-2", "idle"]


async def test_a_tenant_that_floods_waits_behind_one_that_asks_little() -> None:
    queued_jobs = {f"a{n}": QueuedJob(100, tenant="a") for n in range(4)} | {
        f"b{n}": QueuedJob(100, tenant="b") for n in range(2)
    }
    assert await order_of(queued_jobs) == ["a0", "b0", "a1", "b1", "a2", "a3"]


async def test_tokens_count_and_not_jobs_and_weights_count_too() -> None:
    queued_jobs = {f"a{n}": QueuedJob(300, tenant="a") for n in range(3)} | {
        f"b{n}": QueuedJob(100, tenant="b") for n in range(6)
    }
    assert await order_of(queued_jobs) == ["a0", "b0", "b1", "b2", "a1", "b3", "b4", "b5", "a2"]
    heavy = await order_of(queued_jobs, weights={"a": 3.0})
    assert heavy == ["a0", "b0", "a1", "b1", "a2", "b2", "b3", "b4", "b5"]


async def test_who_is_cancelled_while_waiting_or_in_the_very_step_of_his_turn_takes_no_place() -> None:
    engine_queue = EngineQueue(1, FairShares())

    async def take() -> None:
        async with engine_queue.slot(QueuedJob(1)):
            pass

    async with engine_queue.slot(QueuedJob(1)):
        waiting, chosen = asyncio.create_task(take()), asyncio.create_task(take())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
    chosen.cancel()
    await asyncio.gather(waiting, chosen, return_exceptions=True)
    async with asyncio.timeout(60), engine_queue.slot(QueuedJob(1)):
        assert not engine_queue._waiting


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 500)), min_size=1, max_size=60), st.integers(1, 4))
def test_no_tenant_with_work_is_ever_further_behind_than_one_job_a_place(
    jobs: list[tuple[str, int]], places: int
) -> None:
    async def run() -> None:
        shares = FairShares()
        engine_queue = EngineQueue(places, shares)
        waiting = {tenant: sum(1 for name, _ in jobs if name == tenant) for tenant in "abc"}

        async def work(tenant: str, tokens: int) -> None:
            async with engine_queue.slot(QueuedJob(tokens, tenant=tenant)):
                waiting[tenant] -= 1
                served = [shares.served(name) for name in "abc" if waiting[name]]
                assert not served or max(served) - min(served) <= 500 * (places + 1)
                await asyncio.sleep(0)

        await asyncio.gather(*(work(*job) for job in jobs))
        assert not engine_queue._waiting

    asyncio.run(run())


def test_idleness_saves_up_nothing_and_is_forgotten() -> None:
    shares = FairShares()
    shares.join("busy")
    shares.charge("busy", 1_000)
    shares.join("new")
    assert shares.served("new") == 1_000
    for number in range(MAX_REMEMBERED + 50):
        shares.join(str(number))
        shares.leave(str(number))
    assert len(shares._served) <= MAX_REMEMBERED
    assert shares.served("busy") == 1_000


def test_a_tenant_pays_back_what_it_overdrew_before_its_next_job() -> None:
    now = 0.0
    rates = TokenRates(600, {"vip": 6_000}, clock=lambda: now)
    assert rates.wait_s("a") == 0
    rates.charge("a", 700)
    assert rates.wait_s("a") == pytest.approx(10)
    assert rates.wait_s("b") == 0
    now = 10.0
    assert rates.wait_s("a") == 0
    rates.charge("a", 500)
    rates.charge("a", -500)
    assert rates.wait_s("a") == 0
    rates.charge("vip", 700)
    assert rates.wait_s("vip") == 0
    TokenRates(None).charge("a", 10**9)
    assert TokenRates(None).wait_s("a") == 0


def test_whose_job_it_is_comes_from_the_settings_alone() -> None:
    headers = (("x-tenant", b"a"), ("tenant", b"b"))
    assert TenantSettings().tenant_of("jobs", headers) == ""
    assert TenantSettings(header="X-Tenant").tenant_of("jobs", headers) == "a"
    assert TenantSettings(header="missing").tenant_of("jobs", headers) == ""
    assert TenantSettings(by_topic=True).tenant_of("jobs", headers) == "jobs"
    for wrong in ({"header": "t", "by_topic": True}, {"weights": {"a": 0}}, {"limits": {"a": 0}}):
        with pytest.raises(ValueError, match=r"exclude|above 0"):
            TenantSettings(**wrong)


class OneAtATime(GatedEngine):
    """Runs one job and has one more queued."""

    def __init__(self) -> None:
        super().__init__()
        self.max_num_seqs = 1

    @property
    def order(self) -> list[str]:
        return [job_id_of(request) for request in self.requests]


async def test_the_worker_gives_the_engine_jobs_in_that_order_and_keeps_tenants_caches_apart(bench: Bench) -> None:
    engine = OneAtATime()
    tenants = TenantSettings(header="tenant")
    names = [
        ("x1", "x", 0),
        ("x2", "x", 0),
        ("x3", "x", 0),
        ("x4", "x", 0),
        ("y1", "y", 0),
        ("z", "x", -5),
        ("z2", "x", -5),
    ]
    async with bench.working(engine, tenants=tenants):
        for job_id, tenant, priority in names:
            job = {"job_id": job_id, "prompt": "p", "priority": priority, "metadata": {"tenant": "forged"}}
            await bench.send(job, headers=[("Tenant", tenant.encode())])
        await eventually(lambda: reached_window(bench, 7))
        assert engine.order == ["x1", "x2"]
        engine.open(*(name for name, _, _ in names))
        await bench.results(7)
    # Both had equal shares when y1 came; then its share comes before the priority that the other tenant asks for.
    assert engine.order == ["x1", "x2", "z", "y1", "z2", "x3", "x4"]
    assert {request.priority for request in engine.requests} == {0}
    assert {job_id_of(request): request.cache_salt for request in engine.requests}["y1"] == b"y"


async def test_a_priority_outside_of_the_range_is_clamped_and_counted(bench: Bench) -> None:
    engine = OneAtATime()
    asked = {"a": 0, "b": 0, "low": 10**6, "ten": 10, "high": -(2**31), "minus-ten": -10}
    async with bench.working(engine):
        for job_id, priority in asked.items():
            await bench.send({"job_id": job_id, "prompt": "p", "priority": priority})
        await eventually(lambda: reached_window(bench, 6))
        engine.open(*asked)
        await bench.results(6)
    assert engine.order == ["a", "b", "high", "minus-ten", "low", "ten"]
    assert [request.priority for request in engine.requests] == [0, 0, -10, -10, 10, 10]
    assert "nanovllm_priorities_clamped_total 2.0" in bench.metrics.exposition().decode()


def test_a_job_costs_the_same_however_many_tenants_are_remembered() -> None:
    class Counted(OrderedDict[str, float]):
        steps = 0

        def __iter__(self) -> Iterator[str]:
            for name in super().__iter__():
                Counted.steps += 1
                yield name

    shares = FairShares()
    shares._served = Counted()
    for number in range(MAX_REMEMBERED + 50):
        shares.join(f"tenant-{number}")
        shares.leave(f"tenant-{number}")
    assert len(shares._served) == MAX_REMEMBERED
    assert Counted.steps < 200


def reached_window(bench: Bench, jobs: int) -> bool:
    return f"nanovllm_jobs_in_flight {float(jobs)}" in bench.metrics.exposition().decode()


async def test_jobs_behind_their_tenants_rate_hold_up_no_other_tenant(bench: Bench) -> None:
    tenants = TenantSettings(header="tenant", limits={"greedy": 1})
    admission = bench.settings.admission.model_copy(update={"max_jobs": 4, "drain_timeout_s": 0.2})
    for number in range(10):
        await bench.send({"job_id": f"g{number}", "prompt": "word " * 50}, headers=[("tenant", b"greedy")])
    await bench.send({"job_id": "other", "prompt": "p"}, headers=[("tenant", b"modest")])
    async with bench.working(EchoEngine(), tenants=tenants, admission=admission):
        assert set(await bench.results(2)) == {"g0", "other"}
    assert await bench.committed() == 1


async def test_a_record_older_than_its_time_to_live_expires_before_anything_is_fetched(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = int((datetime.now(UTC) - timedelta(minutes=10)).timestamp() * 1000)
    fetcher: Any = None  # any fetch would fail on it
    admission = bench.settings.admission.model_copy(update={"ttl_s": 300.0})
    job = json.dumps({"job_id": "old", "prompt": "<|image|>", "images": ["s3://images/a.png"]}).encode()
    await bench.send(job, timestamp_ms=old)
    await bench.send({"job_id": "fresh", "prompt": "p"})
    async with bench.working(EchoEngine(), fetcher, admission=admission):
        assert set(await bench.results(1)) == {"fresh"}
        ((headers, _),) = await bench.dead_letters(1)
        await eventually(lambda: reached(bench, 2))
    assert (headers["nanovllm_class"], headers["nanovllm_stage"]) == ("expired", "admit")


async def test_a_job_whose_deadline_passes_while_it_waits_for_a_place_never_reaches_the_engine(bench: Bench) -> None:
    engine = OneAtATime()
    async with bench.working(engine):
        await bench.send({"job_id": "a", "prompt": "p"}, {"job_id": "b", "prompt": "p"})
        await engine.submitted("a", "b")
        deadline = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
        await bench.send({"job_id": "late", "prompt": "p", "deadline": deadline})
        ((headers, _),) = await bench.dead_letters(1)
        assert headers["nanovllm_class"] == "expired"
        engine.open("a", "b")
        await bench.results(2)
    assert "late" not in engine.order


def test_the_settings_have_tenants() -> None:
    settings = Settings.model_validate({"tenants": {"header": "tenant", "weights": {"a": 2}}})
    assert settings.tenants.weights == {"a": 2.0}


async def test_a_partition_full_of_bad_messages_does_not_keep_the_others_waiting(bench: Bench) -> None:
    await asyncio.gather(*(bench.send(b"bad") for _ in range(900)))
    await bench.send({"job_id": "beside", "prompt": "p"}, partition=1)
    async with bench.working(EchoEngine()):
        (result,) = await bench.read(bench.settings.topics.results, 1)
        letters = await bench.read(bench.settings.topics.dead_letters, 900)
    before = sum(letter.timestamp < result.timestamp for letter in letters)
    assert before < 300, "the job waited until the partition beside it was empty"


async def test_a_record_from_beyond_the_calendar_has_no_end_but_its_deadline(bench: Bench) -> None:
    """A producer that writes microseconds as its records' timestamps."""
    admission = bench.settings.admission.model_copy(update={"ttl_s": 300.0})
    await bench.send({"job_id": "micro", "prompt": "p"}, timestamp_ms=1_800_000_000_000_000)
    async with bench.working(EchoEngine(), admission=admission):
        assert set(await bench.results(1)) == {"micro"}
