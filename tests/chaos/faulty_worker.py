"""``nanovllm worker`` with an engine (echo or native) that fails when it is told to, by files in a folder.

    python faulty_worker.py FOLDER NAME worker …

``NAME.out-of-memory`` kills the engine at its next request, ``NAME.crash`` the whole process. A prompt with ``POISON``
in it crashes whichever process starts it, and a record with ``UNDECODABLE`` the one that decodes it.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # before the imports, as nanovllm.cli.main does where its first argument is ``worker``
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

import asyncio
import resource
from pathlib import Path
from typing import Any

from nanovllm.cli import main as cli
from nanovllm.engine.backends.base import Generation, Request
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import EngineDead
from nanovllm.messages.codec import decode_job
from nanovllm.pipeline import build
from nanovllm.pipeline.build import build_engine
from nanovllm.pipeline.stages import receive

POISON = "segmentation fault, please"
UNDECODABLE = "segmentation fault while it is decoded, please"
HUNGER = "all the memory, please"
SPARE_BYTES = 256 * 2**20
WORK_S = 0.03


class Orders:
    """The files that tell a worker to fail."""

    def __init__(self, folder: Path, name: str) -> None:
        self._fault_files = {fault: folder / f"{name}.{fault}" for fault in ("out-of-memory", "crash")}

    def crash_if_told(self) -> None:
        if self.take("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)

    def take(self, fault: str) -> bool:
        try:
            self._fault_files[fault].unlink()
        except FileNotFoundError:
            return False
        return True


class FaultyEcho(EchoEngine):
    def __init__(self, orders: Orders, **options: Any) -> None:
        super().__init__(delay_s=WORK_S, **options)
        self._orders = orders

    async def _answer_later(self, request: Request, generation: Generation) -> None:
        if POISON in (request.prompt or ""):
            await asyncio.sleep(WORK_S)  # a crash in a kernel comes some time after the start
            os.kill(os.getpid(), signal.SIGSEGV)
        if HUNGER in (request.prompt or ""):
            exhaust_memory()
        self._orders.crash_if_told()
        if self._orders.take("out-of-memory"):
            self.kill()
            return
        await super()._answer_later(request, generation)


def crash_decoding(data: bytes, **options: Any) -> Any:
    if UNDECODABLE.encode() in data:
        os.kill(os.getpid(), signal.SIGSEGV)
    return decode_job(data, **options)


def exhaust_memory() -> None:
    """Take memory until there is none, and end as the kernel ends a process that took it all."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + SPARE_BYTES, resource.RLIM_INFINITY))
    held = []
    try:
        while True:
            held.append(bytearray(16 * 2**20))
    except MemoryError:
        os.kill(os.getpid(), signal.SIGKILL)


def faulty_native(orders: Orders, settings: Any) -> Any:
    """The engine with the model, which fails likewise."""
    from nanovllm.engine.backends.native import AsyncEngine

    class FaultyNative(AsyncEngine):
        def submit(self, request: Request) -> Generation:
            if POISON in (request.prompt or ""):
                # Not to the model: it might answer before the crash, which would then be laid to whoever comes next.
                asyncio.get_running_loop().call_later(WORK_S, os.kill, os.getpid(), signal.SIGSEGV)
                return Generation(request.request_id, self.abort)
            orders.crash_if_told()
            if orders.take("out-of-memory"):
                self._die(EngineDead("told to run out of memory"))
            return super().submit(request)

    return FaultyNative(build_engine(settings), step_timeout_s=settings.step_timeout_s)


def main() -> None:
    orders = Orders(Path(sys.argv[1]), sys.argv[2])

    async def load_engine(settings: Any) -> Any:
        if settings.engine.backend == "native":
            return await asyncio.to_thread(faulty_native, orders, settings.engine)
        return FaultyEcho(orders, max_num_seqs=settings.engine.seats_elsewhere)

    build.load_engine = load_engine
    receive.decode_job = crash_decoding  # type: ignore[assignment]
    sys.argv = ["nanovllm", *sys.argv[3:]]
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
