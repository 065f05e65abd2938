"""``nanovllm`` whose echo engine takes ``SLOW_WORKER_S`` seconds for a job, in place of an image's entry point.

The first attempt at a job whose prompt begins with ``Again`` fails, whichever worker makes it: it leaves a file in the
folder ``SLOW_WORKER_ATTEMPTS``.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # before the imports, as nanovllm.cli.main does where its first argument is ``worker``
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

from hashlib import sha256
from pathlib import Path
from typing import Any

from nanovllm.cli import main as cli
from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.echo import EchoEngine
from nanovllm.errors import AnswerFailed
from nanovllm.pipeline import build

AGAIN = "Again"


def first_attempt(request: Request) -> AnswerFailed | None:
    """The failure of the first attempt at a job that is to be tried again."""
    if not (request.prompt or "").startswith(AGAIN):
        return None
    attempts = Path(os.environ["SLOW_WORKER_ATTEMPTS"])
    try:
        (attempts / sha256((request.prompt or "").encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return None
    return AnswerFailed("the first attempt fails")


async def load_engine(settings: Any) -> EchoEngine:
    delay_s = float(os.environ["SLOW_WORKER_S"])
    return EchoEngine(delay_s=delay_s, max_num_seqs=settings.engine.seats_elsewhere, fault=first_attempt)


if __name__ == "__main__":
    build.load_engine = load_engine
    sys.exit(cli.main())
