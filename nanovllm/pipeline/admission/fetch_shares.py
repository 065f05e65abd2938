"""Fetch shares: how many objects of one tenant are read at the same time."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count, islice

from nanovllm.pipeline.admission.admission import Reservation

TIMES_FREE = 3
"""A tenant holds at most this many times what is free: alone it gets three quarters, and one that comes finds room."""
SCANNED = 64
"""Most tenants that are looked at for one place: a job costs the same whatever the number of tenants that wait."""


@dataclass(order=True)
class _Waiting:
    lane: int
    arrival: int
    wanted: int = field(compare=False)
    granted: asyncio.Future[None] = field(compare=False)


class FetchShares:
    """Shares ``objects`` that are read at the same time among tenants (dynamic thresholds, Choudhury and Hahne 1998).

    A job takes one for each of its objects, but never more than a tenant that is alone may have, and holds them for as
    long as it fetches. It waits where its tenant would hold more than ``TIMES_FREE`` times what is free then: objects
    that come byte by byte are read for minutes, and nobody else's may wait for them. Of tenants that wait, those that
    hold none go first, in turns; then the one that holds the fewest. In a tenant the lowest lane is next, then the
    earliest. ``most_bytes`` of ``nbytes`` is what one job may reserve: its share when it is alone.
    """

    def __init__(self, objects: int, nbytes: int) -> None:
        self.most_bytes = nbytes * TIMES_FREE // (TIMES_FREE + 1)
        self._free = objects
        self._most = max(1, objects * TIMES_FREE // (TIMES_FREE + 1))
        self._held: dict[str, int] = {}
        self._waiting: dict[str, list[_Waiting]] = {}
        self._arrivals = count()

    async def take(self, tenant: str, objects: int, lane: int, reservation: Reservation) -> int:
        """Take places for ``objects``; returns how many. The job's slot is given up while it waits."""
        waiting = _Waiting(
            lane, next(self._arrivals), min(objects, self._most), asyncio.get_running_loop().create_future()
        )
        heapq.heappush(self._waiting.setdefault(tenant, []), waiting)
        self._hand_out()
        if not waiting.granted.done():
            with reservation.without_slot():
                await self._granted(tenant, waiting)
        return waiting.wanted

    def give_back(self, tenant: str, taken: int) -> None:
        """Give back what ``take`` returned."""
        self._free += taken
        self._held[tenant] -= taken
        if not self._held[tenant]:
            del self._held[tenant]
        self._hand_out()

    async def _granted(self, tenant: str, waiting: _Waiting) -> None:
        try:
            await waiting.granted
        except asyncio.CancelledError:
            if waiting.granted.cancelled():
                self._hand_out()
            else:  # granted in the iteration in which it was cancelled
                self.give_back(tenant, waiting.wanted)
            raise

    def _hand_out(self) -> None:
        while self._free and (tenant := self._next()) is not None:
            queue = self._waiting.pop(tenant)
            chosen = heapq.heappop(queue)
            self._free -= chosen.wanted
            self._held[tenant] = self._held.get(tenant, 0) + chosen.wanted
            chosen.granted.set_result(None)
            if queue:
                self._waiting[tenant] = queue  # behind the others: tenants take turns

    def _next(self) -> str | None:
        """The tenant whose first job gets its places now.

        While a tenant that holds none waits for more than is free, what others give back is kept for it.
        """
        without = list(islice((tenant for tenant in self._waiting if tenant not in self._held), SCANNED))
        firsts = self._firsts_of(without)
        if not firsts:
            fewest = sorted(self._waiting.keys() & self._held.keys(), key=self._held.__getitem__)
            firsts = self._firsts_of(fewest)
        return next((tenant for tenant, first in firsts.items() if self._fits(tenant, first.wanted)), None)

    def _firsts_of(self, tenants: Iterable[str]) -> dict[str, _Waiting]:
        """The first job of each of ``tenants``; those whose waiting jobs were all cancelled are forgotten."""
        firsts = {}
        for tenant in tenants:
            queue = self._waiting[tenant]
            while queue and queue[0].granted.cancelled():
                heapq.heappop(queue)
            if queue:
                firsts[tenant] = queue[0]
            else:
                del self._waiting[tenant]
        return firsts

    def _fits(self, tenant: str, wanted: int) -> bool:
        held, free = self._held.get(tenant, 0), self._free - wanted
        return free >= 0 and (held + wanted <= TIMES_FREE * free or held + wanted == 1)
