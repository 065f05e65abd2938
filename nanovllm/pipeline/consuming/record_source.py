"""The interface of sources, as the worker sees them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from nanovllm.pipeline.consuming.partition import ConsumedRecord


class RecordSource(Protocol):
    """Hands out records, and is told what is finished. `JobSource` and `LineSource` are sources."""

    @property
    def has_joined(self) -> bool:
        """Whether there is something to read from."""

    @property
    def silence_s(self) -> float:
        """How long it has owed an answer."""

    @property
    def missing_topics(self) -> tuple[str, ...]:
        """What should be there to read from, and is not."""

    @property
    def has_put_off(self) -> bool:
        """Whether there are records that only ``poll(put_off=True)`` reads."""

    @property
    def can_read_put_off(self) -> bool:
        """Whether some of them may be read now."""

    @property
    def lags(self) -> Mapping[tuple[str, int], int]:
        """Unfinished records by topic and partition."""

    @property
    def watermarks(self) -> Mapping[tuple[str, int], int]:
        """The offset up to which everything is finished, by topic and partition."""

    async def poll(
        self, max_records: int | Mapping[int, int], timeout_ms: int, *, put_off: bool = False
    ) -> list[ConsumedRecord]:
        """At most ``max_records`` new records, a mapping bounds each lane; waits ``timeout_ms`` for the first."""

    def put_off(self, last: ConsumedRecord, *, is_invalid: bool) -> None:
        """``last`` was no job, or was one."""

    async def watch_topics(self) -> None:
        """Look for changes of what is read; never returns."""

    def stop_taking(self) -> None:
        """Hand out no more records."""

    async def commit(self) -> None:
        """Make what is finished known."""

    async def is_drained(self) -> bool:
        """Whether every record is handed out, finished and committed."""

    async def stop(self) -> None:
        """Commit and end."""
