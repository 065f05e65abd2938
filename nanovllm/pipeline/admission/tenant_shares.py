"""Tenant shares: weighted fair shares of the engine, and token rates."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

MAX_REMEMBERED = 10_000
CHARS_PER_TOKEN = 4


class FairShares:
    """Tokens that each tenant has had, over its weight, and a job's place among tenants by them.

    A tenant that comes back from idleness starts level with the least served of those at work: it has saved up
    nothing. Tenants that were idle longest are forgotten beyond ``MAX_REMEMBERED``.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, *, are_configured: bool = False) -> None:
        """``are_configured``: whether jobs are told apart by tenant, so that a job's own priority comes second."""
        self._weights = dict(weights or {})
        self._are_configured = are_configured
        self._served: OrderedDict[str, float] = OrderedDict()
        self._jobs: dict[str, int] = {}

    def served(self, tenant: str) -> float:
        """Tokens over weight so far."""
        return self._served.get(tenant, 0.0)

    def place(self, tenant: str, priority: int) -> tuple[float, float]:
        """A job's place, the lowest first: the tenant with the least share, and in a tenant the lower priority.

        Without tenants the priority comes first.
        """
        share = self.served(tenant)
        return (share, priority) if self._are_configured else (priority, share)

    def join(self, tenant: str) -> None:
        """The tenant has one more job waiting or running."""
        if tenant not in self._jobs:
            least = min((self.served(other) for other in self._jobs), default=0.0)
            self._served[tenant] = max(self.served(tenant), least)
        self._served.move_to_end(tenant)
        self._jobs[tenant] = self._jobs.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """One job of the tenant has ended."""
        self._jobs[tenant] -= 1
        if not self._jobs[tenant]:
            del self._jobs[tenant]
        if len(self._served) > MAX_REMEMBERED:  # a call of ``join`` has added at most one
            idle = next((name for name in self._served if name not in self._jobs), None)
            if idle is not None:
                del self._served[idle]

    def charge(self, tenant: str, tokens: int) -> None:
        """The tenant got ``tokens`` (a negative number gives some back)."""
        self._served[tenant] = self.served(tenant) + tokens / self._weights.get(tenant, 1.0)


class TokenRates:
    """Lets each tenant use so many tokens a minute: a bucket that holds one minute's worth.

    A job starts as soon as the bucket is not empty, and may overdraw it; the next one waits until that is paid back.
    """

    def __init__(
        self,
        tokens_per_minute: int | None,
        limits: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._default = tokens_per_minute
        self._limits = dict(limits or {})
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, tenant: str) -> float:
        """Seconds until the tenant's next job may start."""
        limit = self._limits.get(tenant, self._default)
        return 0.0 if limit is None else max(0.0, -self._balance(tenant, limit) * 60 / limit)

    def charge(self, tenant: str, tokens: int) -> None:
        """The tenant uses ``tokens`` (a negative number gives some back)."""
        limit = self._limits.get(tenant, self._default)
        if limit is None:
            return
        self._buckets[tenant] = (self._balance(tenant, limit) - tokens, self._clock())
        self._buckets.move_to_end(tenant)
        while len(self._buckets) > MAX_REMEMBERED:
            self._buckets.popitem(last=False)

    async def pass_through(self, tenant: str, tokens: int) -> None:
        """Wait until a job of ``tokens`` may start, and charge it."""
        while True:
            wait_s = self.wait_s(tenant)
            if wait_s <= 0:
                break
            await asyncio.sleep(wait_s)
        self.charge(tenant, tokens)

    def _balance(self, tenant: str, limit: int) -> float:
        balance, at = self._buckets.get(tenant, (float(limit), self._clock()))
        return min(limit, balance + (self._clock() - at) * limit / 60)
