"""Endpoint pool: which server takes a request, and which request goes first."""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import time
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count

from nanovllm.engine.backends.openai.endpoint import Endpoint
from nanovllm.errors import ApiKeyRefused, EndpointsUnavailable, SystemicError


@dataclass(frozen=True)
class Lease:
    """One request's place at an endpoint; ``is_trial``: the first one after its circuit opened."""

    endpoint: Endpoint
    is_trial: bool = False


@dataclass(order=True)
class _Waiter:
    priority: int
    number: int
    affinity: bytes = field(compare=False)
    avoided: Collection[Endpoint] = field(compare=False)
    lease: asyncio.Future[Lease] = field(compare=False)


class Pool:
    """Gives requests their endpoints, in order of priority and arrival.

    Requests of equal ``affinity`` prefer one endpoint (rendezvous hashing: when one goes, only its requests move), as
    long as it has at most ``slack`` requests more than the idlest; otherwise the idlest takes them.
    """

    def __init__(self, endpoints: Sequence[Endpoint], *, max_outstanding: int, slack: int) -> None:
        self.endpoints = tuple(endpoints)
        self._max_outstanding = max_outstanding
        self._slack = slack
        self._waiters: list[_Waiter] = []
        self._numbers = count()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def outstanding(self) -> int:
        """Requests at all endpoints."""
        return sum(endpoint.outstanding for endpoint in self.endpoints)

    @property
    def is_down(self) -> bool:
        """Whether every circuit is open, and no request tries an endpoint now."""
        return all(one.breaker.is_left_out for one in self.endpoints)

    def has_others(self, avoided: Collection[Endpoint]) -> bool:
        """Whether an endpoint that is none of ``avoided`` may take requests, now or after a pause."""
        return any(not endpoint.breaker.is_open and endpoint not in avoided for endpoint in self.endpoints)

    @asynccontextmanager
    async def lease(self, priority: int, affinity: bytes, avoided: Collection[Endpoint]) -> AsyncIterator[Lease]:
        """A place at an endpoint, at one of ``avoided`` only where no other may take requests.

        Raises:
            EndpointsUnavailable, ApiKeyRefused: every circuit is open.
        """
        loop = asyncio.get_running_loop()
        waiter = _Waiter(priority, next(self._numbers), affinity, avoided, loop.create_future())
        bisect.insort(self._waiters, waiter)
        self.serve()
        try:
            lease = await waiter.lease
        except asyncio.CancelledError:
            if waiter.lease.done() and not waiter.lease.cancelled() and waiter.lease.exception() is None:
                self._give_back(waiter.lease.result())
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
        try:
            yield lease
        finally:
            self._give_back(lease)

    def close(self) -> None:
        """Forget the timer; who waits is cancelled by the caller."""
        if self._timer is not None:
            self._timer.cancel()

    def _give_back(self, lease: Lease) -> None:
        lease.endpoint.outstanding -= 1
        if lease.is_trial:
            lease.endpoint.breaker.is_trying = False
        self.serve()

    def serve(self) -> None:
        """Give places to those who wait, as far as there are some; called when an endpoint's state changes."""
        for waiter in tuple(self._waiters):
            if waiter.lease.done():
                continue
            lease = self._choose(waiter)
            if lease is not None:
                lease.endpoint.outstanding += 1
                if lease.is_trial:
                    lease.endpoint.breaker.is_trying = True
                self._waiters.remove(waiter)
                waiter.lease.set_result(lease)
            elif self.is_down and not any(one.breaker.may_try for one in self.endpoints):
                self._waiters.remove(waiter)
                waiter.lease.set_exception(self.unavailable())
        self._set_timer()

    def _choose(self, waiter: _Waiter) -> Lease | None:
        if self.outstanding >= self._max_outstanding:
            return None
        for endpoint in self.endpoints:
            if endpoint.breaker.may_try and not endpoint.is_paused and endpoint not in waiter.avoided:
                return Lease(endpoint, is_trial=True)
        closed = [endpoint for endpoint in self.endpoints if not endpoint.breaker.is_open]
        closed = [endpoint for endpoint in closed if endpoint not in waiter.avoided] or closed
        if not closed:
            trials = (one for one in self.endpoints if one.breaker.may_try and not one.is_paused)
            tried = next(trials, None)
            return None if tried is None else Lease(tried, is_trial=True)
        free = [one for one in closed if not one.is_paused and one.outstanding < one.limit]
        if not free:
            return None
        ranked = sorted(free, key=lambda endpoint: _score(waiter.affinity, endpoint), reverse=True)
        preferred = max(closed, key=lambda endpoint: _score(waiter.affinity, endpoint))
        idlest = min(ranked, key=lambda endpoint: endpoint.outstanding)
        if preferred in free and preferred.outstanding - idlest.outstanding <= self._slack:
            return Lease(preferred)
        return Lease(idlest)

    def unavailable(self) -> SystemicError:
        """The error of a request while no endpoint takes any: what each did last."""
        faults = [(endpoint.url, endpoint.last_fault) for endpoint in self.endpoints]
        said = "; ".join(f"{url} {fault}" for url, fault in faults if fault is not None)
        if all(fault is not None and fault.kind == "refused" for _, fault in faults):
            return ApiKeyRefused(said)
        return EndpointsUnavailable(f"no endpoint answers: {said}")

    def _set_timer(self) -> None:
        """Look again when the first pause, or the first wait of an open circuit, is over."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._waiters:
            return
        now = time.monotonic()
        due = [endpoint.paused_until for endpoint in self.endpoints if endpoint.paused_until > now]
        due += [one.breaker.open_until for one in self.endpoints if one.breaker.is_left_out]
        later = [moment - now for moment in due if moment > now]
        if later:
            self._timer = asyncio.get_running_loop().call_later(min(later) + 0.001, self.serve)


def _score(affinity: bytes, endpoint: Endpoint) -> bytes:
    return hashlib.sha256(affinity + endpoint.url.encode()).digest()
