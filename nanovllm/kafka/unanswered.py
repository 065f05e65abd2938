"""Requests of a client that brokers have not answered: a broker that hangs keeps its connections open."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from aiokafka import AIOKafkaClient
from aiokafka.protocol.group import JoinGroupRequest, SyncGroupRequest

# Their answers wait for the other members of the group.
_PATIENT = (JoinGroupRequest, SyncGroupRequest)


class Unanswered:
    """Times the requests of ``client`` from now on.

    aiokafka 0.14 tells of a request without an answer after ``request_timeout_ms`` alone, which a consumer's rebalance
    makes minutes long.
    """

    def __init__(self, client: AIOKafkaClient, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sent: dict[object, float] = {}  # in the order of their times
        send = client.send

        async def timed(node_id: Any, request: Any, **options: Any) -> Any:
            if isinstance(request, _PATIENT):
                return await send(node_id, request, **options)
            sent = object()
            self._sent[sent] = self._clock()
            try:
                return await send(node_id, request, **options)
            finally:
                del self._sent[sent]

        client.send = timed

    @property
    def oldest_s(self) -> float:
        """Age of the oldest request without an answer; 0 without one. JoinGroup and SyncGroup do not count."""
        return self._clock() - next(iter(self._sent.values())) if self._sent else 0.0
