"""Worker processes under a supervisor that starts again whatever ended."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from random import Random

from world import World

from nanovllm.demo.child_process import LocalProcess

PROGRAM = Path(__file__).with_name("faulty_worker.py")
SUPERVISION_S = 0.2


class Fleet:
    """``size`` workers on ``world``; names are ``w0`` and so on. Faults hit a random one."""

    def __init__(self, world: World, size: int, random: Random) -> None:
        self._world = world
        self._random = random
        self._workers: dict[str, LocalProcess] = {}
        self._supervisor: asyncio.Task[None] | None = None
        self.starts = 0
        self.exit_codes: list[int] = []
        for number in range(size):
            self.add(f"w{number}")

    def add(self, name: str) -> None:
        worker = self._make(name)
        worker.start()
        self._workers[name] = worker
        self.starts += 1

    def _make(self, name: str) -> LocalProcess:
        return self._world.worker(name, program=(str(PROGRAM), str(self._world.directory), name))

    async def __aenter__(self) -> Fleet:
        self._supervisor = asyncio.create_task(self._supervise())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        for worker in self._workers.values():
            worker.kill()

    def any_name(self) -> str:
        return self._random.choice(sorted(self._workers))

    def kill(self, name: str) -> None:
        self._signal(name, signal.SIGKILL)

    async def stop_for(self, name: str, seconds: float) -> None:
        """A zombie: it stands still for longer than its session, and then goes on as if nothing had been."""
        self._signal(name, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        self._signal(name, signal.SIGCONT)

    async def remove(self, name: str) -> None:
        """SIGTERM, and no new one in its place."""
        worker = self._workers.pop(name)
        await asyncio.to_thread(worker.stop, 30.0)

    async def drain(self) -> list[int | None]:
        """SIGTERM to all, and their exit codes."""
        if self._supervisor is not None:
            self._supervisor.cancel()
        workers, self._workers = list(self._workers.values()), {}
        return await asyncio.gather(*(asyncio.to_thread(worker.stop, 60.0) for worker in workers))

    def _signal(self, name: str, number: signal.Signals) -> None:
        worker = self._workers.get(name)
        if worker is not None and worker.is_running and worker.pid is not None:
            os.killpg(worker.pid, number)

    async def _supervise(self) -> None:
        while True:
            await asyncio.sleep(SUPERVISION_S)
            for name, worker in list(self._workers.items()):
                if not worker.is_running:
                    self.exit_codes.append(worker.exit_code or 0)
                    self.add(name)
