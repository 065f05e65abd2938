"""Suspects of a crash: the in-flight record of one partition, and what its next owner concludes from it. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class InFlightRecord:
    """A job in the engine; ``deaths`` counts the workers that ended while it was alone in their engine."""

    deaths: int = 0
    is_alone: bool = False


class SuspectState:
    """The jobs of one partition that are in the engine, and the suspects that have not run yet.

    ``suspects``: deaths by offset, of jobs that were in the engine of a worker that died.
    """

    def __init__(self, suspects: dict[int, int] | None = None) -> None:
        self._suspects = dict(suspects or {})
        self._running: dict[int, InFlightRecord] = {}

    @classmethod
    def after(cls, value: bytes | None, position: int) -> SuspectState:
        """The state of the next owner, which reads from ``position`` on: every recorded job is a suspect, and one that
        was alone has one death more. Unknown values count as an empty record."""
        try:
            jobs = {int(offset): record for offset, record in json.loads(value or b"{}").items()}
            deaths = {offset: int(count) + bool(is_alone) for offset, (count, is_alone) in jobs.items()}
        except (ValueError, TypeError, AttributeError):
            deaths = {}
        return cls({offset: count for offset, count in deaths.items() if offset >= position})

    def deaths_of(self, offset: int) -> int | None:
        """How many workers ended with the job alone in their engine; None: it is no suspect."""
        return self._suspects.get(offset)

    def start(self, offset: int) -> InFlightRecord:
        """Record a job before it starts; a suspect is alone."""
        deaths = self._suspects.get(offset)
        record = self._running[offset] = InFlightRecord(deaths or 0, is_alone=deaths is not None)
        return record

    def leave(self, offset: int, *, is_cleared: bool) -> None:
        """Remove a job from the engine; ``is_cleared``: it ended by itself and is no suspect any more."""
        self._running.pop(offset, None)
        if is_cleared:
            self._suspects.pop(offset, None)

    def encode(self) -> bytes:
        """``{offset: [deaths, is_alone]}``."""
        records = {offset: InFlightRecord(deaths) for offset, deaths in self._suspects.items()} | self._running
        fields = {str(offset): [record.deaths, record.is_alone] for offset, record in records.items()}
        return json.dumps(fields).encode()
