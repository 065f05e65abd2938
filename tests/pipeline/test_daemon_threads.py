"""The pool of daemon threads: reuse, idle ends, errors, callers that are gone, and the end of the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time

import pytest
from parts import eventually

from nanovllm.objects.daemon_threads import DaemonThreads


def running(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


async def test_calls_one_after_another_share_a_thread() -> None:
    threads = DaemonThreads("t-one")
    assert len({await threads.run(threading.get_ident) for _ in range(50)}) == 1
    assert running("t-one") == 1


async def test_calls_at_once_have_a_thread_each_and_later_ones_take_them() -> None:
    threads = DaemonThreads("t-many")
    together = threading.Barrier(8)
    await asyncio.gather(*(threads.run(lambda: together.wait(30)) for _ in range(8)))
    assert running("t-many") == 8
    await asyncio.gather(*(threads.run(lambda: together.wait(30)) for _ in range(8)))
    assert running("t-many") == 8


async def test_an_error_reaches_the_caller_and_the_thread_serves_on() -> None:
    threads = DaemonThreads("t-error")

    def fail() -> None:
        raise SystemExit("not of this thread alone")

    with pytest.raises(SystemExit, match="not of this"):
        await threads.run(fail)
    assert await threads.run(lambda: 7) == 7
    assert running("t-error") == 1


async def test_a_caller_that_is_cancelled_leaves_its_call_and_the_thread_comes_back() -> None:
    threads = DaemonThreads("t-cancel")
    began, ends = threading.Event(), threading.Event()

    def call() -> None:
        began.set()
        ends.wait(30)

    caller = asyncio.create_task(threads.run(call))
    await asyncio.to_thread(began.wait, 30)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert await threads.run(lambda: 1) == 1
    ends.set()
    await eventually(lambda: threads._idle == 2)
    together = threading.Barrier(2)
    await asyncio.gather(*(threads.run(lambda: together.wait(30)) for _ in range(2)))
    assert running("t-cancel") == 2


async def test_threads_without_calls_end_and_no_call_is_lost_to_one_that_ends() -> None:
    threads = DaemonThreads("t-idle", idle_s=0.0005)
    for number in range(2_000):  # a call comes in every state of a thread that is about to end
        assert await threads.run(lambda number=number: number) == number
        if number % 3 == 0:
            await asyncio.sleep(0.0005)
    deadline = time.monotonic() + 30
    while running("t-idle"):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_a_call_that_hangs_does_not_keep_the_process() -> None:
    script = (
        "import asyncio, threading\n"
        "from nanovllm.objects.daemon_threads import DaemonThreads\n"
        "async def main():\n"
        "    task = asyncio.create_task(DaemonThreads('t').run(threading.Event().wait))\n"
        "    await asyncio.sleep(0.1)\n"
        "    task.cancel()\n"
        "asyncio.run(main())\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
