"""``nanovllm worker`` that writes a journal of its documents' steps, and is killed (SIGKILL) behind one of them.

    python killed_worker.py JOURNAL STEP COUNT worker …

A line of the journal: process id, step, and the page or document. ``STEP`` is one of ``STEPS``, or ``none``; ``COUNT``
says which one of these steps is the last. Processes share a journal: each line is one append.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # before the imports, as nanovllm.cli.main does where its first argument is ``worker``
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer

from nanovllm.cli import main as cli
from nanovllm.pipeline.documents.page_store import PageStore
from nanovllm.pipeline.documents.sidecars import Sidecars
from nanovllm.pipeline.stages.context import JobContext, Outcome
from nanovllm.pipeline.stages.publish import Publish

LOOKED, MISSED, KEPT = "looked", "missed", "kept"
WRITING, WRITTEN, COMMITTING, PUBLISHED = "writing", "written", "committing", "published"
PAGE_STEPS = (LOOKED, MISSED, KEPT)
"""The page store is asked for a page; it has none, and the engine is asked; it has it now."""
DOCUMENT_STEPS = (WRITING, WRITTEN, COMMITTING, PUBLISHED)
"""Before and behind a sidecar's write; before a transaction is committed; its records are acknowledged."""
STEPS = (*PAGE_STEPS, *DOCUMENT_STEPS)


class Journal:
    """Notes steps, and kills the process behind the ``count``th ``step``."""

    def __init__(self, path: Path, step: str, count: int) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._last = (step, count)
        self._steps: Counter[str] = Counter()

    def note(self, step: str, name: str) -> None:
        self._steps[step] += 1
        os.write(self._file, f"{os.getpid()} {step} {name}\n".encode())
        if (step, self._steps[step]) == self._last:
            os.killpg(os.getpgrp(), signal.SIGKILL)

    def around(
        self, owner: type, method: str, name_of: Callable[..., str], *, before: str = "", behind: str = ""
    ) -> None:
        """Note ``before`` and ``behind`` each call of a method whose arguments have a ``name_of`` them."""
        original = getattr(owner, method)

        async def noted(itself: Any, *arguments: Any, **options: Any) -> Any:
            name = name_of(*arguments)
            if name and before:
                self.note(before, name)
            result = await original(itself, *arguments, **options)
            if name and behind and not (behind == MISSED and result is not None):
                self.note(behind, name)
            return result

        setattr(owner, method, noted)


def published_by(ended: Sequence[tuple[Outcome, JobContext]], _: object) -> str:
    """The first document that has something to publish; skipped events have nothing."""
    return next((context.job_id for outcome, context in ended if outcome.records), "")


def main() -> None:
    journal = Journal(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    journal.around(PageStore, "get", lambda key: key.digest, before=LOOKED, behind=MISSED)
    journal.around(PageStore, "put", lambda key, _: key.digest, behind=KEPT)
    journal.around(Sidecars, "put", lambda record, *_: record.job_id, before=WRITING, behind=WRITTEN)
    journal.around(AIOKafkaProducer, "commit_transaction", lambda: "-", before=COMMITTING)
    journal.around(Publish, "together", published_by, behind=PUBLISHED)
    sys.argv = ["nanovllm", *sys.argv[4:]]
    sys.exit(cli.main())


if __name__ == "__main__":
    main()
