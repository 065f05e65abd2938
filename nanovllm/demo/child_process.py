"""Child processes of the demo and the tests: their logs, their end, and servers that listen on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanovllm.errors import SystemicError

HOST = "127.0.0.1"

_steps = itertools.count(secrets.randbelow(17_000))  # onwards, so that a process is not given one port twice


def read_loopback(url: str) -> bytes:
    """What a server on loopback answers, which is never reached through the proxy that the environment may name.

    Raises:
        OSError: it does not answer, or not with success.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5) as answer:
        body: bytes = answer.read()
    return body


def free_port() -> int:
    """A TCP port of loopback without a listener; another process may bind it before the caller does.

    It is below Linux's ephemeral ports (from 32768): a client's connection, even one that is tried again while the
    server is down, is never given it as its own.

    Raises:
        OSError: a hundred ports were tried and none was free.
    """
    for _ in range(100):
        port = 15_000 + next(_steps) % 17_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port
    raise OSError(f"no port of {HOST} from 15000 to 31999 is free")


class LocalProcess:
    """A child process in a session of its own, so that Ctrl-C reaches only the parent, which then ends it in order.

    A parent that is killed takes it along on Linux, when it was started in the parent's main thread.

    ``name`` is what messages call it, ``log`` the file that takes stdout and stderr, ``env`` the whole environment
    (None: the parent's).
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._env = env
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
        """SIGKILL to it and its children, as in a crash, and reap it."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def terminate(self) -> None:
        """SIGTERM, without a wait."""
        if self._process is not None:
            self._process.terminate()

    def stop(self, grace_s: float = 10.0) -> int | None:
        """SIGTERM, then SIGKILL after ``grace_s`` seconds; returns the exit code, None when it never ran."""
        if self._process is None:
            return None
        self.terminate()
        try:
            return self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.returncode


def _dying_with_parent() -> list[str]:
    # The kernel watches the thread that forked, not its process: in any other thread the child would die too early.
    program = shutil.which("setpriv") if threading.current_thread() is threading.main_thread() else None
    return [program, "--pdeathsig", "KILL", "--"] if program else []


class LocalServer(ABC):
    """A server on loopback as a child process; a subclass says its command and how it answers.

    Args:
        name: what messages call it.
        directory: of its log and data, kept; None: a temporary one, removed by ``stop()``.
        port: None takes a free one.
    """

    def __init__(self, name: str, directory: Path | None = None, port: int | None = None) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="nanovllm-")
        self._directory = directory or Path(self._temporary.name)
        self._wanted_port = port
        self._port = port or 0
        self._process = LocalProcess(name, (), self._directory / "log")

    @abstractmethod
    def command(self) -> Sequence[str]:
        """The command line of the server on ``_port``.

        Raises:
            ConfigurationError: it is not installed.
        """

    @abstractmethod
    async def answers(self) -> bool:
        """Whether it answers a request now."""

    async def start(self, timeout_s: float = 60.0) -> None:
        """Start it and return when it answers (its port may be open earlier).

        Raises:
            ConfigurationError: it is not installed.
            SystemicError: it ended by itself, or does not answer within ``timeout_s``.
        """
        name, deadline = self._process.name, time.monotonic() + timeout_s
        # Between free_port() and the server's own bind, another process may have taken the port.
        for _ in range(1 if self._wanted_port else 3):
            self._port = self._wanted_port or free_port()
            self._process = LocalProcess(name, self.command(), self._process.log)
            self._process.start()
            while self._process.is_running:
                if await self.answers():
                    return
                if time.monotonic() > deadline:
                    self.stop()
                    raise SystemicError(f"the {name} did not answer within {timeout_s:g} s")
                await asyncio.sleep(0.05)
        raise SystemicError(f"the {name} ended while starting; its last words: {self._process.tail() or 'none'}")

    def stop(self) -> None:
        """End it, and remove its temporary directory. Does nothing when it is not running."""
        self._process.stop()
        self._temporary.cleanup()
