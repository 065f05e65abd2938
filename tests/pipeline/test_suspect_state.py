"""Who is suspected after a death, and who may be charged with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from nanovllm.pipeline.consuming.shared_exclusive_lock import SharedExclusiveLock
from nanovllm.pipeline.consuming.suspect_state import SuspectState


def test_all_that_were_in_the_engine_are_suspects_and_none_is_charged() -> None:
    record = SuspectState()
    for offset in (3, 4, 5):
        assert not record.start(offset).is_alone
    record.leave(4, is_cleared=True)
    after = SuspectState.after(record.encode(), 0)
    assert [after.deaths_of(offset) for offset in (3, 4, 5)] == [0, None, 0]


def test_only_deaths_while_alone_count_and_the_other_suspects_stay_suspects() -> None:
    record = SuspectState({3: 0, 5: 1})
    assert record.start(3).is_alone
    for _ in range(3):
        # The next owner dies of something else before it writes anything: it is still the same one death.
        after = SuspectState.after(record.encode(), 0)
        assert (after.deaths_of(3), after.deaths_of(5)) == (1, 1)


def test_who_comes_out_of_the_engine_is_cleared_and_who_is_taken_out_is_not() -> None:
    record = SuspectState({3: 1, 5: 0})
    for offset in (3, 5):
        record.start(offset)
    record.leave(3, is_cleared=True)
    record.leave(5, is_cleared=False)
    after = SuspectState.after(record.encode(), 0)
    assert (after.deaths_of(3), after.deaths_of(5)) == (None, 0)


def test_jobs_that_are_committed_are_no_suspects() -> None:
    record = SuspectState()
    record.start(3)
    assert SuspectState.after(record.encode(), 4).deaths_of(3) is None


@pytest.mark.parametrize("value", [None, b"", b"[1]", b'{"a": 1}', b'{"1": 2}', b"\xff", b"null"])
def test_a_record_that_is_none_of_ours_accuses_nobody(value: bytes | None) -> None:
    after = SuspectState.after(value, 0)
    assert json.loads(after.encode()) == {"owned": True}
    assert not after.follows_death


def test_who_ends_while_a_record_is_decoded_is_counted_by_the_next_owners() -> None:
    record = SuspectState()
    for deaths in range(3):
        assert record.deaths_receiving(7) == deaths
        record.receive(7)
        record = SuspectState.after(record.encode(), 5)
        assert record.follows_death
    assert SuspectState.after(record.encode(), 8).deaths_receiving(7) == 0
    left = SuspectState.after(record.encode_left(follows_death=True), 5)
    assert (left.deaths_receiving(7), left.follows_death) == (3, True)
    record.end_receive(7)
    assert SuspectState.after(record.encode(), 5).deaths_receiving(7) == 0
    assert record.encode_left(follows_death=False) == b"{}"


def test_a_suspect_that_has_not_run_yet_stays_one_when_its_partition_leaves_alive() -> None:
    record = SuspectState({3: 1})
    record.start(4)
    left = SuspectState.after(record.encode_left(follows_death=False), 0)
    assert (left.deaths_of(3), left.deaths_of(4)) == (1, None)


async def settled() -> None:
    """Return when every task has gone as far as it can by itself."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_one_alone_waits_for_the_others_and_they_for_it() -> None:
    lock, log = SharedExclusiveLock(), list[str]()

    @asynccontextmanager
    async def alone() -> AsyncIterator[None]:
        await lock.acquire_exclusive()
        try:
            yield
        finally:
            lock.release_exclusive()

    async def visit(name: str, place: AbstractAsyncContextManager[None], leave: asyncio.Event) -> None:
        async with place:
            log.append(name)
            await leave.wait()
            log.append(f"{name} left")

    doors = {name: asyncio.Event() for name in ("a", "b", "alone", "late")}
    async with asyncio.TaskGroup() as group:
        for name in ("a", "b"):
            group.create_task(visit(name, lock.shared(), doors[name]))
        await asyncio.sleep(0)
        group.create_task(visit("alone", alone(), doors["alone"]))
        cancelled = group.create_task(visit("cancelled", alone(), doors["alone"]))
        await settled()
        group.create_task(visit("late", lock.shared(), doors["late"]))
        await settled()
        assert log == ["a", "b"]
        cancelled.cancel()
        for name in ("a", "b", "alone", "late"):
            doors[name].set()
            await settled()
    assert log == ["a", "b", "a left", "b left", "alone", "alone left", "late", "late left"]
