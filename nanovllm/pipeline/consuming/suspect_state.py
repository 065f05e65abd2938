"""Who may have killed a worker: what one partition's record says, and what its next owner makes of it. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class InFlightRecord:
    """What is known of a job that was in the engine when its worker was last heard of.

    ``deaths`` counts the workers that died while it was alone in their engine; ``is_alone`` says that it is now.
    """

    deaths: int = 0
    is_alone: bool = False


class SuspectState:
    """The jobs of one partition that are in the engine, and those that are suspected and have not run yet.

    Args:
        suspects: deaths by offset, of jobs that were in the engine of a worker that died.
    """

    def __init__(self, suspects: dict[int, int] | None = None) -> None:
        self._suspects = dict(suspects or {})
        self._running: dict[int, InFlightRecord] = {}

    @classmethod
    def after(cls, value: bytes | None, position: int) -> SuspectState:
        """What the next owner starts with, who reads from ``position`` on: everybody is a suspect, and who was alone
        when the record ended has one death more. A value that is no record of ours accuses nobody."""
        try:
            jobs = {int(offset): charge for offset, charge in json.loads(value or b"{}").items()}
            deaths = {offset: int(count) + bool(is_alone) for offset, (count, is_alone) in jobs.items()}
        except (ValueError, TypeError, AttributeError):
            deaths = {}
        return cls({offset: count for offset, count in deaths.items() if offset >= position})

    def deaths_of(self, offset: int) -> int | None:
        """How many workers the job has killed for certain; None: it is no suspect."""
        return self._suspects.get(offset)

    def start(self, offset: int) -> InFlightRecord:
        """The job is about to start; a suspect is alone."""
        deaths = self._suspects.get(offset)
        charge = self._running[offset] = InFlightRecord(deaths or 0, is_alone=deaths is not None)
        return charge

    def leave(self, offset: int, *, is_cleared: bool) -> None:
        """The job is no longer in the engine; cleared: it came out by itself, and is suspected no more."""
        self._running.pop(offset, None)
        if is_cleared:
            self._suspects.pop(offset, None)

    def encode(self) -> bytes:
        """``{offset: [deaths, is_alone]}``."""
        charges = {offset: InFlightRecord(deaths) for offset, deaths in self._suspects.items()} | self._running
        fields = {str(offset): [charge.deaths, charge.is_alone] for offset, charge in charges.items()}
        return json.dumps(fields).encode()
