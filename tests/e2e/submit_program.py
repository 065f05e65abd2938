"""``nanovllm`` that gets SIGINT once it has recorded so many jobs: ``python submit_program.py COUNT submit …``."""

from __future__ import annotations

import os
import signal
import sys

from nanovllm.cli import main as cli
from nanovllm.cli.journal import Journal


def main() -> None:
    left, record = int(sys.argv[1]), Journal.record

    def interrupting(self: Journal, fingerprint: str, job_id: str) -> None:
        nonlocal left
        record(self, fingerprint, job_id)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGINT)

    Journal.record = interrupting  # type: ignore[method-assign]
    sys.argv = ["nanovllm", *sys.argv[2:]]
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
