"""Outgoing record, and its size."""

from __future__ import annotations

from dataclasses import field

from nanovllm.value_object import value_object

Headers = tuple[tuple[str, bytes], ...]
DEFAULT_MAX_RECORD_BYTES = 1_000_000

_BATCH_OVERHEAD_BYTES = 128
_HEADER_OVERHEAD_BYTES = 10


@value_object
class OutgoingRecord:
    """One Kafka record that is to be published."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    size_bytes: int = field(init=False, repr=False, compare=False)
    """At least what the record takes in a batch of its own."""

    def __post_init__(self) -> None:
        headers = self.headers
        size = _BATCH_OVERHEAD_BYTES + len(self.key or b"") + len(self.value or b"")
        size += _HEADER_OVERHEAD_BYTES * len(headers) + sum([len(value) for _, value in headers])
        names = "".join([name for name, _ in headers])
        size += len(names) if names.isascii() else len(names.encode())
        object.__setattr__(self, "size_bytes", size)
