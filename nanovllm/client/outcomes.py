"""Outcomes of the jobs that one producer has sent: read in the background, given out by ``job_id``."""

from __future__ import annotations

import asyncio
from typing import Any, Self

from nanovllm.client.results import Outcome, ResultReader
from nanovllm.errors import InvalidInput
from nanovllm.settings.worker import Settings


class Outcomes:
    """The first outcome of each expected job, kept until it is taken. An async context manager."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._expected: dict[str, asyncio.Future[Outcome]] = {}

    async def __aenter__(self) -> Self:
        self._reader = ResultReader(self._settings, dead_letters=True)
        await self._reader.__aenter__()
        self._reading = asyncio.create_task(self._read(), name="outcomes")
        return self

    async def __aexit__(self, *error: object) -> None:
        self._reading.cancel()
        await asyncio.wait([self._reading])
        await self._reader.__aexit__(*error)
        for future in self._expected.values():
            future.cancel()

    def expect(self, job_id: str) -> None:
        """Keep the outcome of ``job_id``, which is about to be sent."""
        if job_id not in self._expected:
            self._expected[job_id] = asyncio.get_running_loop().create_future()

    async def take(self, job_id: str) -> Outcome:
        """The outcome of ``job_id``, once.

        Raises:
            InvalidInput: no such job is expected.
            BrokersUnavailable: the topics cannot be read.
        """
        future = self._expected.get(job_id)
        if future is None:
            raise InvalidInput(f"no result of {job_id!r} is expected: this producer has not sent it, or gave it out")
        waited_for: tuple[asyncio.Future[Any], ...] = (future, self._reading)
        await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            self._reading.result()
        del self._expected[job_id]
        return future.result()

    async def _read(self) -> None:
        async for outcome in self._reader:
            future = self._expected.get(outcome.job_id or "")
            if future is not None and not future.done():
                future.set_result(outcome)
