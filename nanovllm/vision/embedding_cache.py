"""Embedding cache: image embeddings in byte-bounded LRU tiers, with single flight.

An entry is found by the digest of pixels and size or, before anything is decoded, by the digest of the file that they
came in. Both keys include the encoder's revision and the tenant's salt.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from nanovllm.errors import ConfigurationError
from nanovllm.statistics import CacheStats, TierStats
from nanovllm.vision.timing import Share, Timed, TotalTime, begin

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CacheOutcome = Literal["hit", "joined", "miss"]

MOST_FILES_AN_ENTRY = 8  # files of equal pixels by which one entry is found; of more, the latest

Note = TypeVar("Note")


def embedding_key(digest: bytes, encoder_revision: str, salt: bytes = b"", *, kind: str = "pixels") -> bytes:
    """Key (32 bytes) of an embedding: a digest of that ``kind``, the encoder's revision, and the tenant's salt."""
    name = hashlib.sha256()
    for part in (kind.encode(), digest, encoder_revision.encode(), salt):
        name.update(len(part).to_bytes(8, "big") + part)
    return name.digest()


@dataclass(eq=False)
class Entry:
    """An embedding, the time that computing it took, and the keys of the files by which it is found."""

    embedding: Tensor
    time: Timed
    files: list[bytes] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's storage, all of which a view keeps alive."""
        return self.embedding.untyped_storage().nbytes()


class MemoryTier:
    """LRU tier in the memory of one device, with at most ``max_bytes`` of tensor storage.

    ``device`` None leaves tensors on theirs. Called under the cache's lock. Raises ConfigurationError for a negative
    bound.
    """

    def __init__(self, name: str, max_bytes: int, device: torch.device | str | None = None) -> None:
        if max_bytes < 0:
            raise ConfigurationError(f"an embedding cache of {max_bytes} bytes is not possible")
        self.name = name
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self.hits = 0
        self.entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._device = device

    def get(self, key: bytes) -> Entry | None:
        """The entry, which becomes the most recently used one."""
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def pop(self, key: bytes) -> Entry:
        """Remove an entry."""
        entry = self.entries.pop(key)
        self.held_bytes -= entry.nbytes
        return entry

    def put(self, key: bytes, entry: Entry) -> Iterator[tuple[bytes, Entry]]:
        """Store an entry of at most ``max_bytes``, and yield the entries evicted for it."""
        if self._device is not None:
            entry.embedding = entry.embedding.to(self._device)
        while self.held_bytes + entry.nbytes > self.max_bytes:
            oldest = next(iter(self.entries))
            yield oldest, self.pop(oldest)
        self.entries[key] = entry
        self.held_bytes += entry.nbytes


class EmbeddingCache(Generic[Note]):
    """Embeddings by key in one or more tiers, fastest first; an entry is in one of them.

    Every method may be called from any thread. Returned tensors are the stored ones: read-only. A bound of 0 stores
    nothing and still joins equal work.
    """

    def __init__(self, max_bytes: int, *further: MemoryTier, device: torch.device | str | None = None) -> None:
        """``max_bytes`` bound the tier on the encoder's ``device``; ``further`` tiers take its evictions, in order.

        Raises ConfigurationError for a negative bound.
        """
        self._tiers = (MemoryTier("device", max_bytes, device), *further)
        self._device = device
        self._lock = threading.Lock()
        self._flights: dict[bytes, Future[Entry]] = {}
        self._files: dict[bytes, tuple[bytes, Note]] = {}
        self._misses = self._joined = self._evictions = self._hits_by_file = 0
        self._saved = TotalTime()

    def get_or_compute(
        self, keys: Sequence[bytes], compute: Callable[[list[int]], Sequence[Tensor]]
    ) -> list[tuple[Tensor, CacheOutcome]]:
        """Return an embedding for every key, computing those that are neither held nor being computed.

        ``compute`` gets the indices into ``keys`` to compute and returns as many tensors, in order; it runs outside
        the lock, once. Each tensor is copied, so it may be a view into a batch. A key that repeats within ``keys``, or
        is being computed by another thread, is ``joined``. Raises what ``compute`` raises, in all threads that joined.
        """
        found: dict[int, tuple[Tensor, CacheOutcome]] = {}
        led: dict[int, Future[Entry]] = {}
        followed: dict[int, Future[Entry]] = {}
        with self._lock:
            for index, key in enumerate(keys):
                embedding = self._hit(key)
                if embedding is not None:
                    found[index] = embedding, "hit"
                elif key in self._flights:
                    followed[index] = self._flights[key]
                    self._joined += 1
                else:
                    led[index] = self._flights[key] = Future()
                    self._misses += 1
        # Own work first: other threads wait for it, and the work of theirs waited for here has begun.
        if led:
            self._lead(keys, led, compute)
        for index, flight in (led | followed).items():
            entry = flight.result()
            found[index] = entry.embedding, "miss" if index in led else "joined"
            if index in followed:
                self._saved.add(entry.time)
        return [found[index] for index in range(len(keys))]

    def name(self, file: bytes, key: bytes, note: Note) -> None:
        """Make the entry of ``key``, if it is held, findable by the key ``file`` too, with ``note`` beside it."""
        with self._lock:
            entry = next((entry for tier in self._tiers if (entry := tier.get(key)) is not None), None)
            if entry is None or file in self._files:
                return
            self._files[file] = key, note
            entry.files.append(file)
            if len(entry.files) > MOST_FILES_AN_ENTRY:
                del self._files[entry.files.pop(0)]

    def find(self, file: bytes) -> tuple[Tensor, Note] | None:
        """The embedding and note that `name` stored under ``file``, or None, which counts as no miss.

        An eviction drops the cache's reference only: the caller may keep the tensor.
        """
        with self._lock:
            if file not in self._files:
                return None
            key, note = self._files[file]
            embedding = self._hit(key)
            assert embedding is not None  # an eviction removes the entry's files too
            self._hits_by_file += 1
            return embedding, note

    def touch(self, key: bytes) -> bool:
        """Whether the entry of ``key`` is held; it becomes the most recently used one. Counts as no hit."""
        with self._lock:
            return self._use(key) is not None

    def stats(self) -> CacheStats:
        """Counts since the start, and what is held now."""
        with self._lock:
            tiers = tuple(
                TierStats(tier.name, tier.hits, len(tier.entries), tier.held_bytes, tier.max_bytes)
                for tier in self._tiers
            )
            return CacheStats(
                hits=sum(tier.hits for tier in tiers),
                misses=self._misses,
                joined=self._joined,
                evictions=self._evictions,
                entries=sum(tier.entries for tier in tiers),
                bytes=sum(tier.bytes for tier in tiers),
                max_bytes=sum(tier.max_bytes for tier in tiers),
                hits_by_file=self._hits_by_file,
                seconds_saved=self._saved.seconds,
                tiers=tiers,
            )

    def audit(self) -> None:
        """Assert the invariants: counted bytes are those held, within the bound, each tensor in its own storage."""
        with self._lock:
            entries = [entry for tier in self._tiers for entry in tier.entries.values()]
            for tier in self._tiers:
                held = sum(entry.nbytes for entry in tier.entries.values())
                assert held == tier.held_bytes <= tier.max_bytes, (tier.name, held, tier.held_bytes, tier.max_bytes)
            for entry in entries:
                tight = entry.embedding.numel() * entry.embedding.element_size()
                assert entry.nbytes == tight, "an entry pins a larger buffer"
            storages = {entry.embedding.untyped_storage().data_ptr() for entry in entries}
            assert len(storages) == len(entries), "two entries share storage"
            names = sorted(name for entry in entries for name in entry.files)
            assert names == sorted(self._files), "names and entries differ"

    def _hit(self, key: bytes) -> Tensor | None:
        """Under the lock: the embedding on the encoder's device, where any tier has it."""
        found = self._use(key)
        if found is None:
            return None
        tier, entry = found
        tier.hits += 1
        self._saved.add(entry.time)
        return entry.embedding if self._device is None else entry.embedding.to(self._device)

    def _use(self, key: bytes) -> tuple[MemoryTier, Entry] | None:
        """Under the lock: the entry and the tier that held it; it moves to the first tier if it fits in there."""
        for tier in self._tiers:
            entry = tier.get(key)
            if entry is None:
                continue
            if tier is not self._tiers[0] and entry.nbytes <= self._tiers[0].max_bytes:
                self._store(key, tier.pop(key))
            return tier, entry
        return None

    def _lead(
        self, keys: Sequence[bytes], led: dict[int, Future[Entry]], compute: Callable[[list[int]], Sequence[Tensor]]
    ) -> None:
        interval = begin(self._device)
        try:
            computed = compute(list(led))
            if len(computed) != len(led):
                raise ValueError(f"{len(led)} embeddings were asked for, {len(computed)} computed")
            interval.end()
            time = Share(interval, len(led))
            # Copies: a view would keep the whole batch's storage alive behind one entry.
            entries = [Entry(embedding.detach().clone(), time) for embedding in computed]
        except BaseException as error:
            with self._lock:
                for index, flight in led.items():
                    del self._flights[keys[index]]
                    flight.set_exception(error)
            raise
        with self._lock:
            for (index, flight), entry in zip(led.items(), entries, strict=True):
                del self._flights[keys[index]]
                flight.set_result(entry)  # all of them first: a copy to another device may fail
            for index, entry in zip(led, entries, strict=True):
                # Another object: threads that joined read theirs outside the lock.
                self._store(keys[index], Entry(entry.embedding, entry.time))

    def _store(self, key: bytes, entry: Entry) -> None:
        """Under the lock: put an entry into the first tier that can hold it, and what it evicts into the next."""
        moving = [(key, entry)]
        for tier in self._tiers:
            leaving: list[tuple[bytes, Entry]] = []
            for name, moved in moving:
                if moved.nbytes > tier.max_bytes:
                    leaving.append((name, moved))
                else:
                    leaving += tier.put(name, moved)
            moving = leaving
        for _, dropped in moving:
            self._evictions += dropped is not entry  # an entry too large for every tier was in none of them
            for file in dropped.files:
                del self._files[file]
