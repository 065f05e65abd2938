"""Journal of ``nanovllm submit``: which jobs the brokers have, so that the command repeated sends the rest."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ValidationError

from nanovllm.errors import InvalidInput
from nanovllm.sinks.jsonl import JsonLinesSink


class SentJob(BaseModel):
    """A job that the brokers have acknowledged."""

    fingerprint: str
    job_id: str


class Journal:
    """The jobs that earlier commands have sent, in the file ``path``; None: none are remembered. A context manager.

    What a command that was killed had sent and not yet recorded is sent again, under the same job id where it has one.

    Raises:
        InvalidInput: the file cannot be written, is in use, or is no journal.
    """

    def __init__(self, path: Path | None) -> None:
        self._sink = JsonLinesSink(path) if path else None
        self._sent: Counter[str] = Counter()

    def __enter__(self) -> Self:
        if self._sink is not None:
            self._sink.__enter__()
            for number, line in enumerate(self._sink.lines(), start=1):
                try:
                    self._sent[SentJob.model_validate_json(line).fingerprint] += 1
                except ValidationError:
                    self._sink.__exit__()
                    raise InvalidInput(f"{self._sink.path}, line {number}: is no journal of sent jobs") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._sink is not None:
            self._sink.__exit__()

    @property
    def has_file(self) -> bool:
        """Whether what is sent is remembered."""
        return self._sink is not None

    def passes_over(self, fingerprint: str) -> bool:
        """Whether the next job with ``fingerprint`` was sent before; equal jobs count one by one."""
        if not self._sent[fingerprint]:
            return False
        self._sent[fingerprint] -= 1
        return True

    def record(self, fingerprint: str, job_id: str) -> None:
        """The brokers have a job."""
        if self._sink is not None:
            self._sink.write(SentJob(fingerprint=fingerprint, job_id=job_id))
