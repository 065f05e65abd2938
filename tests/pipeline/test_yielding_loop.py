"""The worker's event loop beside an engine's thread: it runs what other loops run, and gives way."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from nanovllm.pipeline.operations import yielding_loop
from nanovllm.pipeline.operations.yielding_loop import YieldingSelector


async def work(seconds: float) -> int:
    """Callbacks for so many seconds without a wait; returns how many."""
    count, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        count += 1
        await asyncio.sleep(0)
    return count


def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The sleeps of this thread from now on; others of the process sleep too."""
    seen: list[float] = []
    sleep, own = time.sleep, threading.get_ident()

    def noting(seconds: float) -> None:
        if threading.get_ident() == own:
            seen.append(seconds)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", noting)
    return seen


@pytest.mark.parametrize("beside_engine", [True, False])
def test_a_loop_that_is_never_idle_pauses_beside_an_engine_alone(
    beside_engine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = pauses(monkeypatch)
    assert yielding_loop.run(work(0.05), beside_engine=beside_engine)
    assert bool(seen) == beside_engine


def test_timers_sockets_and_errors_are_those_of_any_loop() -> None:
    async def main() -> bytes:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readline())
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            await asyncio.sleep(0.01)
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"hello\n")
            line, _ = await asyncio.gather(reader.readline(), work(0.02))
            writer.close()
            return line

    assert yielding_loop.run(main(), beside_engine=True) == b"hello\n"

    async def fail() -> None:
        raise ValueError("planted")

    with pytest.raises(ValueError, match="planted"):
        yielding_loop.run(fail(), beside_engine=True)


def test_a_pause_comes_after_callbacks_and_not_after_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = pauses(monkeypatch)
    selector = YieldingSelector()
    monkeypatch.setattr(yielding_loop, "MAX_RUN_S", 60.0)
    selector.select(0.001)
    selector.select(0)
    assert not seen
    monkeypatch.setattr(yielding_loop, "MAX_RUN_S", 0.0)
    selector.select(0.001)
    assert not seen
    selector.select(0)
    assert seen == [yielding_loop.YIELD_S]
    selector.close()
