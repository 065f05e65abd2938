"""Image embeddings, computed once: a byte-bounded LRU with single flight, shared by all requests and threads."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from nanovllm.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

    from nanovllm.vision.transform import PreparedImage

CacheOutcome = Literal["hit", "joined", "miss"]


@dataclass(frozen=True)
class CacheStats:
    """Counts since the start, and what is held now. ``joined`` waited for another's computation, or repeated it."""

    hits: int
    misses: int
    joined: int
    evictions: int
    entries: int
    bytes: int
    max_bytes: int


@dataclass
class _Flight:
    """One key's computation under way; ``embedding`` stays None when it failed."""

    done: threading.Event = field(default_factory=threading.Event)
    embedding: Tensor | None = None


def embedding_key(image: PreparedImage, encoder_revision: str, salt: bytes = b"") -> bytes:
    """The identity (32 bytes) of an image's embedding: its pixels and size, the encoder, and the tenant's salt."""
    digest = hashlib.sha256()
    for part in (image.digest, encoder_revision.encode(), salt):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()


class EmbeddingCache:
    """Embeddings by key, least recently used out first, at most ``max_bytes`` of real tensor storage.

    Every method may be called from any thread. The tensors handed out are the stored ones: read them, never write.
    ``max_bytes`` 0 stores nothing and still joins equal work.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ConfigurationError(f"an embedding cache of {max_bytes} bytes is not possible")
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[bytes, Tensor] = OrderedDict()
        self._flights: dict[bytes, _Flight] = {}
        self._bytes = 0
        self._hits = self._misses = self._joined = self._evictions = 0

    def get_or_compute(
        self, keys: Sequence[bytes], compute: Callable[[list[int]], Sequence[Tensor]]
    ) -> list[tuple[Tensor, CacheOutcome]]:
        """Return an embedding for every key, computing those that nobody has and nobody is computing.

        ``compute`` gets the indices into ``keys`` to compute and returns as many tensors, in order; it runs outside
        the lock, once, and again only for keys whose other computation failed. Views into a batch are fine: each is
        copied. A key that repeats within ``keys``, or is being computed by another thread, is ``joined``.
        """
        outcomes: dict[int, CacheOutcome] = {}
        embeddings: dict[int, Tensor] = {}
        pending = list(range(len(keys)))
        while pending:
            led, followed = self._claim(keys, pending, embeddings, outcomes)
            # Our own first: others wait for it, while what we wait for is under way already.
            if led:
                self._lead(keys, led, compute)
            pending = []
            for index, flight in {**led, **followed}.items():
                flight.done.wait()
                if flight.embedding is None:
                    pending.append(index)
                else:
                    embeddings[index] = flight.embedding
        self._count(outcomes)
        return [(embeddings[index], outcomes[index]) for index in range(len(keys))]

    def get(self, key: bytes) -> Tensor | None:
        """The stored embedding, which counts as a hit and as a use, or None, which counts as nothing."""
        with self._lock:
            embedding = self._entries.get(key)
            if embedding is not None:
                self._entries.move_to_end(key)
                self._hits += 1
            return embedding

    def stats(self) -> CacheStats:
        """Counts since the start, and what is held now."""
        with self._lock:
            return CacheStats(
                hits=self._hits,
                misses=self._misses,
                joined=self._joined,
                evictions=self._evictions,
                entries=len(self._entries),
                bytes=self._bytes,
                max_bytes=self._max_bytes,
            )

    def clear(self) -> None:
        """Forget all embeddings; what is being computed is stored when it is done."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def audit(self) -> None:
        """Assert the invariants: the bytes counted are the bytes held, within the bound, each tensor in own storage."""
        with self._lock:
            held = [_storage_bytes(embedding) for embedding in self._entries.values()]
            assert sum(held) == self._bytes <= self._max_bytes, (sum(held), self._bytes, self._max_bytes)
            for embedding, size in zip(self._entries.values(), held, strict=True):
                assert size == embedding.numel() * embedding.element_size(), "an entry pins a larger buffer"
            storages = {embedding.untyped_storage().data_ptr() for embedding in self._entries.values()}
            assert len(storages) == len(self._entries), "two entries share storage"

    def _claim(
        self,
        keys: Sequence[bytes],
        pending: list[int],
        embeddings: dict[int, Tensor],
        outcomes: dict[int, CacheOutcome],
    ) -> tuple[dict[int, _Flight], dict[int, _Flight]]:
        """Take the hits, and split the rest into flights that this call leads and flights that it follows."""
        led: dict[int, _Flight] = {}
        followed: dict[int, _Flight] = {}
        with self._lock:
            for index in pending:
                key = keys[index]
                if key in self._entries:
                    self._entries.move_to_end(key)
                    embeddings[index] = self._entries[key]
                    outcomes.setdefault(index, "hit")
                elif key in self._flights:
                    followed[index] = self._flights[key]
                    outcomes.setdefault(index, "joined")
                else:
                    led[index] = self._flights[key] = _Flight()
                    outcomes[index] = "miss"
        return led, followed

    def _lead(
        self, keys: Sequence[bytes], led: dict[int, _Flight], compute: Callable[[list[int]], Sequence[Tensor]]
    ) -> None:
        copies: list[Tensor] = []
        try:
            computed = compute(list(led))
            if len(computed) != len(led):
                raise ValueError(f"{len(led)} embeddings were asked for, {len(computed)} computed")
            # A copy each: a view would keep the whole batch's buffer alive behind one entry.
            copies = [embedding.detach().clone() for embedding in computed]
        finally:
            with self._lock:
                for position, (index, flight) in enumerate(led.items()):
                    del self._flights[keys[index]]
                    if copies:
                        flight.embedding = copies[position]
                        self._store(keys[index], copies[position])
                    flight.done.set()

    def _store(self, key: bytes, embedding: Tensor) -> None:
        size = _storage_bytes(embedding)
        if size > self._max_bytes:
            return
        while self._bytes + size > self._max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self._bytes -= _storage_bytes(evicted)
            self._evictions += 1
        self._entries[key] = embedding
        self._bytes += size

    def _count(self, outcomes: dict[int, CacheOutcome]) -> None:
        found = list(outcomes.values())
        with self._lock:
            self._hits += found.count("hit")
            self._misses += found.count("miss")
            self._joined += found.count("joined")


def _storage_bytes(embedding: Tensor) -> int:
    return embedding.untyped_storage().nbytes()
