"""Tiers of the embedding cache: where entries are kept within a bound, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from nanovllm.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(eq=False)
class Entry:
    """An embedding, the seconds that computing it took, and the names of the files that it is known by."""

    embedding: Tensor
    seconds: float
    files: list[bytes] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Of the tensor's storage, which a view would pin as a whole."""
        return self.embedding.untyped_storage().nbytes()


class Tier(Protocol):
    """A place that keeps entries by key within a bound. Called under the cache's lock, one call at a time.

    The cache asks its tiers in order; an entry is in one of them. A tier beyond this process would be one more class.
    """

    name: str
    max_bytes: int
    held_bytes: int

    def get(self, key: bytes) -> Entry | None:
        """The entry, which counts as a use."""

    def pop(self, key: bytes) -> Entry:
        """Give the entry up."""

    def put(self, key: bytes, entry: Entry) -> Iterator[tuple[bytes, Entry]]:
        """Keep an entry of at most ``max_bytes``, and yield what had to leave for it."""

    def entries(self) -> Iterator[Entry]:
        """All entries."""

    def __len__(self) -> int:
        """How many there are."""


class MemoryTier:
    """Entries in the memory of one device, least recently used out first, at most ``max_bytes`` of tensor storage."""

    def __init__(self, name: str, max_bytes: int, device: torch.device | str | None = None) -> None:
        """``device`` None keeps tensors where they are."""
        if max_bytes < 0:
            raise ConfigurationError(f"an embedding cache of {max_bytes} bytes is not possible")
        self.name = name
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._device = device
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

    def get(self, key: bytes) -> Entry | None:
        """The entry, which counts as a use."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def pop(self, key: bytes) -> Entry:
        """Give the entry up."""
        entry = self._entries.pop(key)
        self.held_bytes -= entry.nbytes
        return entry

    def put(self, key: bytes, entry: Entry) -> Iterator[tuple[bytes, Entry]]:
        """Keep an entry of at most ``max_bytes``, and yield what had to leave for it."""
        if self._device is not None:
            entry.embedding = entry.embedding.to(self._device)
        while self.held_bytes + entry.nbytes > self.max_bytes:
            oldest = next(iter(self._entries))
            yield oldest, self.pop(oldest)
        self._entries[key] = entry
        self.held_bytes += entry.nbytes

    def entries(self) -> Iterator[Entry]:
        """All entries."""
        return iter(self._entries.values())

    def __len__(self) -> int:
        """How many there are."""
        return len(self._entries)
