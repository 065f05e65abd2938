"""Suspects of a crash: the in-flight record of one partition, and what its next owner concludes from it. Pure."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

_OWNED = "owned"
_RECEIVED = "received"


@dataclass(frozen=True)
class InFlightRecord:
    """A job in the engine; ``deaths`` counts the workers that ended while it was alone in their engine."""

    deaths: int = 0
    is_alone: bool = False


class SuspectState:
    """The jobs of one partition that are in the engine, and the suspects that have not run yet.

    Args:
        suspects: deaths by offset, of jobs that were in the engine of a worker that died.
        follows_death: the last owner has not left the partition alive.
        received: deaths by offset, of the record that the last owner was decoding.
    """

    def __init__(
        self,
        suspects: dict[int, int] | None = None,
        *,
        follows_death: bool = False,
        received: dict[int, int] | None = None,
    ) -> None:
        self._suspects = dict(suspects or {})
        self._running: dict[int, InFlightRecord] = {}
        self._parts: Counter[int] = Counter()
        self.follows_death = follows_death
        self._received = dict(received or {})
        self._receiving: int | None = None

    @classmethod
    def after(cls, value: bytes | None, position: int) -> SuspectState:
        """The state of the next owner, which reads from ``position`` on: every recorded job is a suspect, and one that
        was alone has one death more. Unknown values count as an empty record."""
        try:
            fields = json.loads(value or b"{}")
            was_owned = bool(fields.pop(_OWNED, False))
            received = {
                int(offset): int(count) + bool(is_now) for offset, (count, is_now) in fields.pop(_RECEIVED, {}).items()
            }
            jobs = {int(offset): record for offset, record in fields.items()}
            deaths = {offset: int(count) + bool(is_alone) for offset, (count, is_alone) in jobs.items()}
        except (ValueError, TypeError, AttributeError):
            return cls()
        return cls(
            {offset: count for offset, count in deaths.items() if offset >= position},
            follows_death=was_owned,
            received={offset: count for offset, count in received.items() if offset >= position},
        )

    def deaths_of(self, offset: int) -> int | None:
        """How many workers ended with the job alone in their engine; None: it is no suspect."""
        return self._suspects.get(offset)

    def deaths_receiving(self, offset: int) -> int:
        """How many workers ended while they decoded the record."""
        return self._received.get(offset, 0)

    def receive(self, offset: int) -> None:
        """Record that this record is decoded next."""
        self._receiving = offset

    def end_receive(self, offset: int) -> None:
        """The record is decoded."""
        self._receiving = None
        self._received.pop(offset, None)

    def start(self, offset: int) -> InFlightRecord:
        """Record a job, or a part of one, before it starts; a suspect is alone."""
        deaths = self._suspects.get(offset)
        record = self._running[offset] = InFlightRecord(deaths or 0, is_alone=deaths is not None)
        self._parts[offset] += 1
        return record

    def leave(self, offset: int, *, is_cleared: bool) -> None:
        """Remove a job from the engine, or a part of one; ``is_cleared``: as ``clear``."""
        self._parts[offset] -= 1
        if self._parts[offset] <= 0:
            del self._parts[offset]
            self._running.pop(offset, None)
        if is_cleared:
            self.clear(offset)

    def clear(self, offset: int) -> None:
        """The job ended by itself and is no suspect any more."""
        self._suspects.pop(offset, None)

    def encode(self) -> bytes:
        """``{offset: [deaths, is_alone], "owned": true, "received": {offset: [deaths, is_now]}}``."""
        running = {offset: [record.deaths, record.is_alone] for offset, record in self._running.items()}
        return self._encode(running, receiving=self._receiving, is_owned=True)

    def encode_left(self, *, follows_death: bool) -> bytes:
        """As ``encode``, for the next owner of a partition that leaves alive: what was suspected still is."""
        return self._encode({}, receiving=None, is_owned=follows_death)

    def _encode(self, running: dict[int, list[int | bool]], *, receiving: int | None, is_owned: bool) -> bytes:
        jobs = {offset: [deaths, False] for offset, deaths in self._suspects.items()} | running
        fields: dict[str, object] = {str(offset): job for offset, job in jobs.items()}
        if is_owned:
            fields[_OWNED] = True
        received = {offset: [deaths, False] for offset, deaths in self._received.items()}
        if receiving is not None:
            received[receiving] = [self.deaths_receiving(receiving), True]
        if received:
            fields[_RECEIVED] = {str(offset): record for offset, record in received.items()}
        return json.dumps(fields).encode()
