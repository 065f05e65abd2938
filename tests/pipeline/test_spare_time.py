"""Work that can wait, beside an event loop that is idle and one that never is."""

from __future__ import annotations

import asyncio
import time

import pytest

from nanovllm.pipeline.stages.spare_time import BUSY_TURN_S, spare_time


async def test_work_that_can_wait_goes_on_beside_a_loop_that_is_never_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "nanovllm.pipeline.stages.spare_time.PATIENCE_S", 0.5
    )  # this process may stand still for longer than 3 ms
    turns = 0

    async def keep_busy() -> None:
        nonlocal turns
        while True:
            end = time.perf_counter() + 2 * BUSY_TURN_S
            while time.perf_counter() < end:
                pass
            turns += 1
            await asyncio.sleep(0)

    busy = asyncio.create_task(keep_busy())
    try:
        for _ in range(3):
            before = turns
            await spare_time()
            assert turns - before > 4, "it did not wait for the others"
    finally:
        busy.cancel()


async def test_a_chain_of_steps_ends_before_work_that_can_wait_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm.pipeline.stages.spare_time.PATIENCE_S", 60.0)
    steps: list[int] = []

    async def chain() -> None:
        for step in range(3):
            await asyncio.sleep(0)
            steps.append(step)

    job = asyncio.create_task(chain())
    await spare_time()
    assert steps == [0, 1, 2]
    await job
