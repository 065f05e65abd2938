"""Watch over servers between requests: those left out are tried by a timer, and idle ones asked for their models."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence

from nanovllm.engine.backends.openai.endpoint import Endpoint
from nanovllm.engine.backends.openai.faults import EndpointFault

logger = logging.getLogger(__name__)

SHORTEST_TICK_S = 0.05


class Watch:
    """Looks at each of ``endpoints`` every ``tick_s``, apart from the others; one that hangs holds up none.

    ``check`` finds out whether one that is left out takes requests again. One that has no request at work, and has
    answered none for ``idle_s``, is asked for its models; where it has a fault, or lacks ``model``, it is left out.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        check: Callable[[Endpoint], Awaitable[object]],
        *,
        model: str,
        tick_s: float,
        idle_s: float,
    ) -> None:
        self._check = check
        self._model = model
        self._tick_s = max(tick_s, SHORTEST_TICK_S)
        self._idle_s = idle_s
        self._tasks = [asyncio.create_task(self._watch(one), name="nanovllm-watch") for one in endpoints]

    async def close(self) -> None:
        """End the watch."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self, endpoint: Endpoint) -> None:
        while True:
            # Many workers that start at once do not ask at once for ever.
            await asyncio.sleep(random.uniform(0.75, 1.25) * self._tick_s)
            if endpoint.is_paused or endpoint.checking.locked():
                continue
            try:
                if endpoint.breaker.may_try and not endpoint.refuses_all:
                    await self._check(endpoint)
                elif endpoint.is_idle(self._idle_s) and not endpoint.breaker.is_open:
                    await self._look(endpoint)
            except Exception:
                logger.exception("the watch over %s failed", endpoint.url)

    async def _look(self, endpoint: Endpoint) -> None:
        try:
            await endpoint.look(self._model)
        except EndpointFault as fault:
            logger.warning("%s %s", endpoint.url, fault)
