"""Jobs of one key, one after another."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from bench import Bench, GatedEngine
from parts import eventually

from nanovllm.pipeline.admission.key_order import KeyOrder, KeyTurn


async def has_come(turn: KeyTurn) -> bool:
    try:
        async with asyncio.timeout(0.01):
            await turn.wait()
    except TimeoutError:
        return False
    return True


async def test_a_turn_comes_when_the_one_before_has_ended_and_keys_do_not_wait_for_one_another() -> None:
    order = KeyOrder()
    first, second, other = order.join("a"), order.join("a"), order.join("b")
    assert await has_come(first)
    assert await has_come(other)
    assert not await has_come(second)
    first.end()
    assert await has_come(second)


async def test_one_that_ends_before_its_turn_lets_nobody_overtake() -> None:
    order = KeyOrder()
    first, cancelled, last = (order.join("a") for _ in range(3))
    cancelled.end()
    assert not await has_come(last)
    first.end()
    assert await has_come(last)


async def test_a_key_without_jobs_is_forgotten() -> None:
    order = KeyOrder()
    turns = [order.join(key) for key in "aab"]
    assert len(order._last) == 2
    for turn in turns:
        turn.end()
        turn.end()
    assert len(order._last) == 0


@pytest.mark.parametrize(("per_key_order", "together"), [(True, 2), (False, 3)])
async def test_jobs_with_equal_keys_run_one_after_another_where_that_is_set(
    bench: Bench, per_key_order: bool, together: int
) -> None:
    jobs: list[dict[str, Any]] = [{"job_id": name, "prompt": name} for name in ("a1", "a2", "b1")]
    for job in jobs:
        await bench.send(job, key=job["job_id"][:1].encode())
    engine = GatedEngine()
    admission = bench.settings.admission.model_copy(update={"per_key_order": per_key_order})
    async with bench.working(engine, admission=admission):
        await eventually(lambda: len(engine.requests) == together)
        await bench.polled()
        assert len(engine.requests) == together
        engine.open("a1", "b1")
        await engine.submitted("a2")
        engine.open("a2")
        await bench.results(3)
