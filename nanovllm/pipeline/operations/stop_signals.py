"""SIGTERM and SIGINT while the worker starts, works and ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

logger = logging.getLogger("nanovllm.worker")

DONE = 0
FAILED = 1

# Without jobs there is nothing to drain: leaving the group is tried for so long.
IDLE_STOP_S = 1.5


class StopSignals:
    """The first signal stops the worker, the second one ends the process at once with exit code 1.

    Until ``hand_to``, the first signal ends the process at once with ``code_before_work``: no job was taken. The
    handlers are Python's own (``signal.signal``), not the event loop's: they run between two byte codes of the main
    thread, also while modules are imported. PID 1 of a container ignores every signal without a handler.
    """

    def __init__(self, *, code_before_work: int = DONE) -> None:
        self._code_before_work = code_before_work
        self._received = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: Callable[[], object] | None = None
        self._has_taken: Callable[[], bool] = lambda: False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    @property
    def is_stopping(self) -> bool:
        """Whether a signal has come."""
        return self._received > 0

    def hand_to(self, stop: Callable[[], object], has_taken: Callable[[], bool] = lambda: False) -> None:
        """Let the first signal call ``stop`` in the running event loop.

        ``has_taken``: whether any job was taken so far; as long as none was, a stop may take ``IDLE_STOP_S``.
        """
        self._loop, self._stop, self._has_taken = asyncio.get_running_loop(), stop, has_taken

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received += 1
        if self._received > 1:
            end_at_once(FAILED)
        if self._loop is None:
            os.write(sys.stderr.fileno(), b"nanovllm: stopped before the first job\n")  # no lock, unlike print
            end_at_once(self._code_before_work)
        with suppress(RuntimeError):  # the loop is closed: the process ends anyway
            # Neither logging nor threads here: the main thread may hold the locks that they need.
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        logger.info("stopping: no more jobs are taken")
        timer = threading.Timer(IDLE_STOP_S, self._end_if_idle)
        timer.daemon = True
        timer.start()
        if self._stop is not None:
            self._stop()

    def _end_if_idle(self) -> None:
        if not self._has_taken():
            end_at_once(self._code_before_work)


def end_at_once(code: int) -> NoReturn:
    """End the process with ``code``, whatever its threads do."""
    # Not sys.exit: that would wait for threads that read or compute.
    os._exit(code)
