"""A child process of the demo and the tests: started with a log file, ended politely and then for certain."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_steps = itertools.count(secrets.randbelow(17_000))  # onwards, so that a process is not given one port twice


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port without a listener; another process may bind it before the caller does.

    It is below Linux's ephemeral ports (from 32768): a client's connection, even one that is tried again while the
    server is down, is never given it as its own.

    Raises:
        OSError: a hundred ports were tried and none was free.
    """
    for _ in range(100):
        port = 15_000 + next(_steps) % 17_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise OSError(f"no port of {host} from 15000 to 31999 is free")


class LocalProcess:
    """One child process in a session of its own, so that Ctrl-C reaches only the parent, which then ends it in order.

    A parent that is killed takes it along on Linux, when it was started in the parent's main thread.

    ``name`` is what messages call it, ``log`` the file that takes stdout and stderr, ``env`` the whole environment
    (None: the parent's).
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = log
        self._command = list(command)
        self._env = dict(env) if env is not None else None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process id, None before the start."""
        return self._process.pid if self._process else None

    @property
    def exit_code(self) -> int | None:
        """Exit status as in ``subprocess`` (negative: ended by that signal); None while it runs or never did."""
        return self._process.poll() if self._process else None

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it; its log is appended to. Raises OSError when the program cannot be run."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        output: IO[bytes]
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [*_dying_with_parent(), *self._command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._env,
                start_new_session=True,
            )

    def tail(self, lines: int = 10) -> str:
        """The last lines of the log."""
        try:
            text = self.log.read_text(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def kill(self) -> None:
        """End it and its children at once, as a crash would (SIGKILL), and reap it."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def terminate(self) -> None:
        """SIGTERM, without waiting for what it does."""
        if self._process is not None:
            self._process.terminate()

    def stop(self, grace_s: float = 10.0) -> int | None:
        """SIGTERM, then SIGKILL after ``grace_s`` seconds; returns the exit code, None when it never ran."""
        if self._process is None:
            return None
        if self._process.poll() is None:
            self.terminate()
            try:
                self._process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.kill()
        return self._process.returncode


def _dying_with_parent() -> list[str]:
    # The kernel watches the thread that forked, not its process: in any other thread the child would die too early.
    program = shutil.which("setpriv") if threading.current_thread() is threading.main_thread() else None
    return [program, "--pdeathsig", "KILL", "--"] if program else []
