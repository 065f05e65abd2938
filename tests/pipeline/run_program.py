"""``nanovllm`` with an engine that echoes slowly and writes down what it computes: for runs that are killed.

python run_program.py LOG DELAY_S run -i jobs.jsonl -o results.jsonl

A delay below 0 is SIGINT while the engine is loaded.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from nanovllm.cli import main as cli
from nanovllm.engine.backends.base import Generation, Request
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.pipeline import build


class WritingEngine(EchoEngine):
    """Appends the prompt of each request to ``log`` when it is submitted."""

    def __init__(self, log: Path, **options: Any) -> None:
        super().__init__(**options)
        self._log = log

    def submit(self, request: Request) -> Generation:
        with self._log.open("a") as file:
            file.write(f"{request.prompt}\n")
        return super().submit(request)


def main() -> None:
    log, delay_s = Path(sys.argv[1]), float(sys.argv[2])

    async def load_engine(settings: Any) -> Any:
        if delay_s < 0:
            os.kill(os.getpid(), signal.SIGINT)
        return WritingEngine(log, delay_s=delay_s, max_num_seqs=settings.engine.seats_elsewhere)

    build.load_engine = load_engine
    sys.argv = ["nanovllm", *sys.argv[3:]]
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
