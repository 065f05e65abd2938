"""``nanovllm worker`` with an echo engine that fails when it is told to, by files in a folder.

    python faulty_worker.py FOLDER NAME worker …

``NAME.out-of-memory`` kills the engine at its next request, ``NAME.crash`` the whole process. A prompt with ``POISON``
in it crashes whichever process starts it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

from nanovllm.engine.backend import Generation, Request
from nanovllm.engine.echo import EchoEngine
from nanovllm.pipeline import app, cli

POISON = "segmentation fault, please"
WORK_S = 0.03


class FaultyEngine(EchoEngine):
    def __init__(self, folder: Path, name: str, **options: Any) -> None:
        super().__init__(delay_s=WORK_S, **options)
        self._fault_files = {fault: folder / f"{name}.{fault}" for fault in ("out-of-memory", "crash")}

    async def _answer(self, request: Request, generation: Generation) -> None:
        if POISON in (request.prompt or ""):
            await asyncio.sleep(WORK_S)  # a crash in a kernel comes some time after the start
            os.kill(os.getpid(), signal.SIGSEGV)
        if self._is_told_to("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if self._is_told_to("out-of-memory"):
            self.kill()
            return
        await super()._answer(request, generation)

    def _is_told_to(self, fault: str) -> bool:
        try:
            self._fault_files[fault].unlink()
        except FileNotFoundError:
            return False
        return True


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]

    async def load_engine(settings: Any) -> EchoEngine:
        return FaultyEngine(folder, name, max_num_seqs=settings.max_num_seqs)

    app._load_engine = load_engine
    sys.argv = ["nanovllm", *sys.argv[3:]]
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
