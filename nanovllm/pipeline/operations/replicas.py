"""Replicas: worker processes on one machine, each bound to its own cores, and the process that starts and ends them."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import IO

from nanovllm.errors import ConfigurationError, counted
from nanovllm.pipeline.operations.core_sets import core_sets
from nanovllm.pipeline.operations.stop_signals import DONE, FAILED
from nanovllm.settings.worker import ENV_PREFIX, Settings

logger = logging.getLogger("nanovllm.replicas")

_MISUSE = 2
_POLL_S = 0.1
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_LASTING_S = 60.0  # a replica that ran for so long begins anew with the shortest pause
_MOST_ENDS = 5  # of one replica in a row, none of which lasted
_PR_SET_PDEATHSIG = 1
_LAST_PORT = 65_535
_LAST_LINES_S = 1.0  # for what a replica wrote before its end; a process that it started may hold its output for longer


@dataclass
class _Replica:
    """One replica and its current process."""

    index: int
    cores: tuple[int, ...]
    process: subprocess.Popen[bytes]
    output: threading.Thread
    started: float
    signals_sent: int = 0
    ends: int = 0
    starts_at: float | None = None  # where it has ended and is to start again
    code: int | None = None  # where it has ended for good


class Replicas:
    """Workers of one machine.

    Each has its own cores, a thread for each of them, the port ``http.port`` + its index, and its index behind
    ``worker_id``, ``kafka.client_id`` and ``kafka.group_instance_id``. They share the packed weights, and what
    ``engine.cpu_memory_utilization`` leaves for KV caches is divided among them.

    A replica that ends is started again, after one second, or twice as long as before. The others go on. Where one has
    ended five times in a row within a minute of its start, or says that the settings cannot work, all are stopped.
    Signals are passed on: the first one drains, the second one ends at once. Where this process is killed, the replicas
    drain.
    """

    def __init__(self, settings: Settings, command: Sequence[str]) -> None:
        """``command`` starts a worker, and is given ``--replica`` and the index.

        Raises ConfigurationError where there are too few cores or ports.
        """
        self._settings, self._command = settings, command
        self._signals: list[int] = []
        self._cores = cores_of_replicas(settings)

    def run(self, *, until_all_end: bool = False) -> int:
        """Run the replicas until they are stopped; returns the exit code of the process.

        0: all have ended with 0; 2: the settings cannot work; 1: anything else. ``until_all_end``: one that ends with 0
        has done its work, and is not started again.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        replicas = [self._start(index, cores) for index, cores in enumerate(self._cores)]
        while any(replica.code is None for replica in replicas):
            for replica in replicas:
                self._watch(replica, until_all_end)
            time.sleep(_POLL_S)
        codes = {replica.code for replica in replicas}
        return _MISUSE if _MISUSE in codes else DONE if codes == {DONE} else FAILED

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    def _watch(self, replica: _Replica, until_all_end: bool) -> None:
        if replica.code is not None:
            return
        if replica.starts_at is not None:
            if self._signals:
                replica.code = DONE
            elif time.monotonic() >= replica.starts_at:
                fresh = self._start(replica.index, replica.cores)
                replica.process, replica.output, replica.started = fresh.process, fresh.output, fresh.started
                replica.starts_at = None
            return
        code = replica.process.poll()
        if code is None:
            for number in self._signals[replica.signals_sent :]:
                replica.process.send_signal(number)
            replica.signals_sent = len(self._signals)
            return
        replica.output.join(_LAST_LINES_S)
        if self._signals or code == _MISUSE or (until_all_end and code == DONE):
            replica.code = code
        else:
            self._start_again(replica, code)
        if replica.code not in (None, DONE) and not self._signals:
            self._signals.append(signal.SIGTERM)

    def _start_again(self, replica: _Replica, code: int) -> None:
        has_lasted = time.monotonic() - replica.started >= _LASTING_S
        replica.ends = 1 if has_lasted else replica.ends + 1
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if replica.ends == _MOST_ENDS:
            logger.error("replica %d ended (%s) %d times in a row: all are stopped", replica.index, how, replica.ends)
            replica.code = FAILED
            return
        pause_s = min(_FIRST_PAUSE_S * 2 ** (replica.ends - 1), _LONGEST_PAUSE_S)
        logger.error("replica %d ended (%s): it is started again in %.0f s", replica.index, how, pause_s)
        replica.starts_at = time.monotonic() + pause_s

    def _start(self, index: int, cores: tuple[int, ...]) -> _Replica:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)  # inherited
        try:
            process = subprocess.Popen(
                [*self._command, "--replica", str(index)],
                env={**os.environ, **replica_variables(self._settings, index), **_threads(len(cores))},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,  # a terminal's Ctrl-C comes by this process alone: a second signal would not drain
            )
        finally:
            os.sched_setaffinity(0, before)
        assert process.stdout is not None
        # A line of JSON has the replica's name in it.
        prefix = b"" if self._settings.log_format == "json" else f"[{index}] ".encode()
        output = threading.Thread(target=_pass_on, args=(process.stdout, prefix), daemon=True)
        output.start()
        port = self._settings.http.port
        logger.info(
            "replica %d is process %d on %s %s, port %s",
            *(index, process.pid, counted(len(cores), "core").split()[1], ",".join(map(str, cores))),
            port + index if port else "free",
        )
        return _Replica(index, cores, process, output, time.monotonic())


def cores_of_replicas(settings: Settings) -> list[tuple[int, ...]]:
    """The numbers of each replica's cores; raises ConfigurationError where there are too few cores or ports."""
    last = settings.http.port + settings.replicas - 1
    if settings.http.port and last > _LAST_PORT:
        raise ConfigurationError(
            f"http.port={settings.http.port}: the last of {settings.replicas} replicas would listen on port {last}; "
            f"set {_LAST_PORT - settings.replicas + 1} at most"
        )
    return core_sets(settings.replicas)


def replica_variables(settings: Settings, index: int) -> dict[str, str]:
    """The settings, as variables, by which replica ``index`` differs from the worker of ``settings``."""
    kafka, port = settings.kafka, settings.http.port
    names = {
        "REPLICAS": 1,
        "WORKER_ID": f"{settings.worker_id}-{index}",
        "HTTP__PORT": port + index if port else 0,
        "KAFKA__CLIENT_ID": f"{kafka.client_id}-{index}",
        "ENGINE__CPU_MEMORY_SHARES": settings.replicas * settings.engine.cpu_memory_shares,
    }
    if kafka.group_instance_id is not None:
        names["KAFKA__GROUP_INSTANCE_ID"] = f"{kafka.group_instance_id}-{index}"
    return {f"{ENV_PREFIX}{name}": str(value) for name, value in names.items()}


def _threads(cores: int) -> dict[str, str]:
    """A thread for each core, or as many as were asked for where these are fewer."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return {"OMP_NUM_THREADS": str(min(cores, int(asked)) if asked.isdecimal() else cores)}


def end_with_parent() -> None:
    """Have the system send this process SIGTERM when its parent ends, however it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _pass_on(output: IO[bytes], prefix: bytes) -> None:
    """Write each line of a replica with its prefix to standard error.

    Where nobody reads that any more the lines are lost: a replica whose output nobody took would stand still.
    """
    for line in output:
        with suppress(OSError):
            sys.stderr.buffer.write(prefix + line)
            sys.stderr.buffer.flush()
