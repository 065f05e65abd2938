"""The thread that loads a model, which the end of a start does not wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from nanovllm.objects.daemon_threads import DaemonThreads

T = TypeVar("T")

_NAME = "nanovllm-loading"


async def in_loading_thread(load: Callable[[], T]) -> T:
    """What ``load`` returns or raises; the loop goes on meanwhile, and a task that is cancelled leaves the thread.

    Not an executor's thread: those are waited for, and weights are read for minutes.
    """
    return await DaemonThreads(_NAME, idle_s=0.0).run(load)


def is_loading() -> bool:
    """Whether a thread still loads. The interpreter's end would take its lock from it, in the midst of torch."""
    return any(thread.name == _NAME for thread in threading.enumerate())
