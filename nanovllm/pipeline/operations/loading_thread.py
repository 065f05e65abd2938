"""The thread that loads a model, which the end of a start does not wait for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_NAME = "nanovllm-loading"


async def in_loading_thread(load: Callable[[], T]) -> T:
    """What ``load`` returns or raises; the loop goes on meanwhile, and a task that is cancelled leaves the thread.

    Not an executor's thread: those are waited for, and weights are read for minutes.
    """
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()  # a task that is cancelled does not end the thread

    def run() -> None:
        try:
            outcome.set_result(load())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name=_NAME, daemon=True).start()
    return await asyncio.wrap_future(outcome)


def is_loading() -> bool:
    """Whether a thread still loads. The interpreter's end would take its lock from it, in the midst of torch."""
    return any(thread.name == _NAME for thread in threading.enumerate())
