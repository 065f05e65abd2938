"""Outgoing record, and its size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

Headers = tuple[tuple[str, bytes], ...]
DEFAULT_MAX_RECORD_BYTES = 1_000_000

_BATCH_OVERHEAD_BYTES = 128
_HEADER_OVERHEAD_BYTES = 10


@dataclass(frozen=True)
class OutgoingRecord:
    """One Kafka record that is to be published."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()

    @cached_property
    def size_bytes(self) -> int:
        """At least what the record takes in a batch of its own."""
        size = _BATCH_OVERHEAD_BYTES + len(self.key or b"") + len(self.value or b"")
        for name, value in self.headers:
            size += len(name.encode()) + len(value) + _HEADER_OVERHEAD_BYTES
        return size
