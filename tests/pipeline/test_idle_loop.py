"""Work of low priority, beside an event loop that is idle and one that never is; the clock is the test's."""

from __future__ import annotations

import asyncio

from nanovllm.pipeline.operations.idle_loop import BUSY_ITERATION_S, IDLE_ITERATIONS, MAX_WAIT_S, idle_loop


async def test_beside_a_loop_that_is_never_idle_it_waits_for_its_bound_and_no_longer() -> None:
    now, iterations = 0.0, 0

    async def keep_busy() -> None:
        nonlocal now, iterations
        while True:
            now += 2 * BUSY_ITERATION_S
            iterations += 1
            await asyncio.sleep(0)

    busy = asyncio.create_task(keep_busy())
    for _ in range(3):
        began = iterations
        await idle_loop(lambda: now)
        waited = iterations - began
        assert IDLE_ITERATIONS < waited <= MAX_WAIT_S / (2 * BUSY_ITERATION_S) + 1
    busy.cancel()


async def test_it_returns_as_soon_as_the_loop_is_idle_and_not_before_a_chain_of_steps_has_ended() -> None:
    steps: list[int] = []

    async def chain() -> None:
        for step in range(3):
            await asyncio.sleep(0)
            steps.append(step)

    job = asyncio.create_task(chain())
    await idle_loop(lambda: 0.0)
    assert steps == [0, 1, 2]
    await job
