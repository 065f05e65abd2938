"""Engine queue: which admitted job gets the next slot."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from itertools import count

from nanovllm.pipeline.admission.lanes import LaneTurns
from nanovllm.pipeline.admission.tenant_shares import FairShares
from nanovllm.value_object import value_object


@value_object
class QueuedJob:
    """One job that waits for a slot, or has one.

    ``tokens`` estimates what it will use; a lower ``lane`` goes first. ``engine_priority`` orders those that wait
    inside the engine, and says which of them is preempted last.
    """

    tokens: int
    priority: int = 0
    tenant: str = ""
    deadline: datetime | None = None
    lane: int = 0
    engine_priority: int = 0


@dataclass(frozen=True, eq=False)
class _Waiting:
    queued: QueuedJob
    arrival: int
    granted: asyncio.Future[None]


class EngineQueue:
    """Grants ``slots`` of the engine.

    By lane, in turns; in a lane by `FairShares.place`; then by deadline, jobs without one last; then by arrival.
    """

    def __init__(self, slots: int, shares: FairShares) -> None:
        self._free = slots
        self._shares = shares
        self._waiting: list[_Waiting] = []
        self._arrivals = count()
        self._lanes = LaneTurns()

    def slot(self, queued: QueuedJob) -> _Slot:
        """Hold a slot inside ``async with``; waits for one."""
        return _Slot(self, queued)

    def settle(self, queued: QueuedJob, tokens: int) -> None:
        """Charge the tokens that the job used, in place of the estimate that was charged with its slot."""
        self._shares.charge(queued.tenant, tokens - queued.tokens)

    async def take(self, queued: QueuedJob) -> None:
        """Wait for a slot; `give_back` it."""
        self._shares.join(queued.tenant)
        try:
            await self._take(queued)
        except BaseException:
            self._shares.leave(queued.tenant)
            raise

    def give_back(self, queued: QueuedJob) -> None:
        """Give back the slot that ``queued`` took."""
        self._free += 1
        self._hand_out()
        self._shares.leave(queued.tenant)

    async def _take(self, queued: QueuedJob) -> None:
        if self._free and not self._waiting:
            self._grant(queued, {queued.lane})
            return
        waiting = _Waiting(queued, next(self._arrivals), asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._hand_out()
        try:
            await waiting.granted
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            elif not waiting.granted.cancelled():
                # Granted in the iteration in which it was cancelled.
                self._free += 1
                self._shares.charge(queued.tenant, -queued.tokens)
                self._hand_out()
            raise

    def _hand_out(self) -> None:
        if not self._waiting:
            return
        # Many are cancelled at once when a partition leaves; each future knows it before its task does.
        self._waiting = [waiting for waiting in self._waiting if not waiting.granted.cancelled()]
        while self._free and self._waiting:
            # A scan, not a heap: shares change with every job, and the window holds a few hundred.
            lanes = {waiting.queued.lane for waiting in self._waiting}
            lane = self._lanes.next(lanes)
            chosen = min((one for one in self._waiting if one.queued.lane == lane), key=self._order)
            self._waiting.remove(chosen)
            self._grant(chosen.queued, lanes)
            chosen.granted.set_result(None)

    def _grant(self, queued: QueuedJob, lanes: Collection[int]) -> None:
        """Give a free slot to a job, while jobs of ``lanes`` waited for one."""
        self._lanes.serve(queued.lane, lanes)
        self._free -= 1
        self._shares.charge(queued.tenant, queued.tokens)

    def _order(self, waiting: _Waiting) -> tuple[tuple[float, float], bool, float, int]:
        queued = waiting.queued
        deadline = queued.deadline.timestamp() if queued.deadline else 0.0
        place = self._shares.place(queued.tenant, queued.priority)
        return place, queued.deadline is None, deadline, waiting.arrival


class _Slot:
    # Not a generator's context manager: that takes as long as all else which a slot needs.
    __slots__ = ("_queue", "_queued")

    def __init__(self, queue: EngineQueue, queued: QueuedJob) -> None:
        self._queue = queue
        self._queued = queued

    async def __aenter__(self) -> None:
        await self._queue.take(self._queued)

    async def __aexit__(self, *_: object) -> None:
        self._queue.give_back(self._queued)
