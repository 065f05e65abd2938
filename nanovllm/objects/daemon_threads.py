"""A pool of daemon threads for calls that block.

An executor will not do: the interpreter waits for its threads, and a store that hangs would outlast the drain's budget.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

IDLE_S = 30.0
"""A thread that has had no call for so long ends."""


class DaemonThreads:
    """Threads named ``name``, one more where none is idle; the caller bounds how many calls there are at once."""

    def __init__(self, name: str, *, idle_s: float = IDLE_S) -> None:
        self._name = name
        self._idle_s = idle_s
        self._calls: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]]] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0  # threads that wait for a call, less the calls that wait for a thread

    async def run(self, function: Callable[[], T]) -> T:
        """What ``function`` returns or raises in a thread; a caller that is cancelled does not end the call."""
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._lock:
            is_served = self._idle > 0
            self._idle -= is_served
        if is_served:
            self._calls.put((function, outcome))
        else:
            threading.Thread(target=self._serve, args=(function, outcome), name=self._name, daemon=True).start()
        return await outcome

    def _serve(self, function: Callable[[], Any], outcome: asyncio.Future[Any]) -> None:
        while True:
            result, raised = None, None
            try:
                result = function()
            except BaseException as error:
                raised = error
            with self._lock:
                self._idle += 1  # before the caller knows: its next call finds this thread
            with suppress(RuntimeError):  # the loop is closed, and nothing waits
                outcome.get_loop().call_soon_threadsafe(_settle, outcome, result, raised)
            del function, outcome, result, raised  # what they hold is not kept while the thread waits
            try:
                function, outcome = self._calls.get(timeout=self._idle_s)
            except Empty:
                with self._lock:
                    if self._idle > 0:
                        self._idle -= 1
                        return
                function, outcome = self._calls.get()  # each thread that waits has a call on its way


def _settle(outcome: asyncio.Future[Any], result: Any, raised: BaseException | None) -> None:
    if outcome.done():
        return  # the caller was cancelled
    if raised is None:
        outcome.set_result(result)
    else:
        outcome.set_exception(raised)
