"""Embedding cache: image embeddings in byte-bounded LRU tiers, with single flight.

An entry is found by the digest of pixels and size or, before anything is decoded, by the digest of the file that they
came in. Both keys include the encoder's revision and the tenant's salt.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain
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

    ``device`` None leaves tensors on theirs. All but `copy` is called under the cache's lock. Raises ConfigurationError
    for a negative bound.
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

    def put(self, key: bytes, entry: Entry) -> None:
        """Store an entry, for which there is room."""
        self.entries[key] = entry
        self.held_bytes += entry.nbytes

    def room_for(self, key: bytes, incoming: Mapping[bytes, Entry]) -> list[bytes]:
        """The keys that leave for ``incoming`` entries, oldest first; the entry of ``key`` is leaving anyway."""
        leaving = []
        moving = self.entries.get(key)
        excess = self.held_bytes + sum(entry.nbytes for entry in incoming.values()) - self.max_bytes
        excess -= moving.nbytes if moving is not None else 0
        for name, entry in chain(self.entries.items(), incoming.items()):
            if excess <= 0:
                break
            if entry is not moving:
                leaving.append(name)
                excess -= entry.nbytes
        return leaving

    def copy(self, embedding: Tensor) -> Tensor:
        """``embedding`` on the tier's device: itself where it is there already. May wait for the device."""
        return embedding if self._device is None else embedding.to(self._device)


class EmbeddingCache(Generic[Note]):
    """Embeddings by key in one or more tiers, fastest first; an entry is in one of them.

    Every method may be called from any thread. `get_or_compute`, `on_device` and `touch` may move entries between
    tiers, and then wait for a device: they are for the engine's thread. The others do not wait, for moves neither: an
    entry is found where it was until its copy is complete. Returned tensors are the stored ones: read-only. A bound of
    0 stores nothing and still joins equal work.
    """

    def __init__(self, max_bytes: int, *further: MemoryTier, device: torch.device | str | None = None) -> None:
        """``max_bytes`` bound the tier on the encoder's ``device``; ``further`` tiers take its evictions, in order.

        Raises ConfigurationError for a negative bound.
        """
        self._tiers = (MemoryTier("device", max_bytes, device), *further)
        self._device = device
        self._lock = threading.Lock()  # of what is recorded; held for moments
        self._moves = threading.Lock()  # of which tier has what; held while entries are copied
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
        held: dict[int, Entry] = {}
        led: dict[int, Future[Entry]] = {}
        followed: dict[int, Future[Entry]] = {}
        with self._lock:
            for index, key in enumerate(keys):
                entry = self._hit(key)
                if entry is not None:
                    held[index] = entry
                elif key in self._flights:
                    followed[index] = self._flights[key]
                    self._joined += 1
                else:
                    led[index] = self._flights[key] = Future()
                    self._misses += 1
        try:
            for index, entry in held.items():
                found[index] = self._bring(keys[index], entry), "hit"
        except BaseException as error:
            self._fail(keys, led, error)
            raise
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
            entry = self._use(key)
            if entry is None or file in self._files:
                return
            self._files[file] = key, note
            entry.files.append(file)
            if len(entry.files) > MOST_FILES_AN_ENTRY:
                del self._files[entry.files.pop(0)]

    def find(self, file: bytes) -> tuple[Tensor, Note] | None:
        """The embedding and note that `name` stored under ``file``, or None, which counts as no miss.

        The embedding is where its tier has it: `on_device` brings it to the encoder. An eviction drops the cache's
        reference only: the caller may keep the tensor.
        """
        with self._lock:
            if file not in self._files:
                return None
            key, note = self._files[file]
            entry = self._hit(key)
            assert entry is not None  # an eviction removes the entry's files too
            self._use(key)
            self._hits_by_file += 1
            return entry.embedding, note

    def on_device(self, key: bytes, embedding: Tensor) -> Tensor:
        """What `find` returned of the entry of ``key``, on the encoder's device; the entry moves there too."""
        with self._lock:
            entry = self._entry(key)
        return self._to_device(embedding) if entry is None else self._bring(key, entry)

    def holds(self, key: bytes) -> bool:
        """Whether the entry of ``key`` is held; it becomes its tier's most recently used one. Counts as no hit."""
        with self._lock:
            return self._use(key) is not None

    def touch(self, key: bytes) -> bool:
        """As `holds`, and the entry moves to the first tier if it fits in there."""
        with self._lock:
            entry = self._entry(key)
        if entry is not None:
            self._bring(key, entry)
        return entry is not None

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

    def _tier(self, key: bytes) -> MemoryTier | None:
        """Under the lock: the tier that has the entry."""
        return next((tier for tier in self._tiers if key in tier.entries), None)

    def _entry(self, key: bytes) -> Entry | None:
        """Under the lock: the entry, wherever it is."""
        tier = self._tier(key)
        return None if tier is None else tier.entries[key]

    def _use(self, key: bytes) -> Entry | None:
        """Under the lock: the entry, which becomes the most recently used one of its tier."""
        tier = self._tier(key)
        return None if tier is None else tier.get(key)

    def _hit(self, key: bytes) -> Entry | None:
        """Under the lock: the entry, and a hit of the tier that has it."""
        tier = self._tier(key)
        if tier is None:
            return None
        entry = tier.entries[key]
        tier.hits += 1
        self._saved.add(entry.time)
        return entry

    def _bring(self, key: bytes, entry: Entry) -> Tensor:
        """The embedding on the encoder's device; the entry moves to the first tier if it fits in there."""
        with self._moves:
            with self._lock:
                self._use(key)
                is_behind = self._tier(key) not in (None, self._tiers[0])
            if is_behind and entry.nbytes <= self._tiers[0].max_bytes:
                self._store(key, entry)
            return self._to_device(entry.embedding)

    def _to_device(self, embedding: Tensor) -> Tensor:
        return self._tiers[0].copy(embedding)

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
            self._fail(keys, led, error)
            raise
        try:
            with self._moves:
                for index, entry in zip(led, entries, strict=True):
                    # Another object: threads that joined read theirs outside the locks.
                    self._store(keys[index], Entry(entry.embedding, entry.time))
        finally:  # a copy to another device may fail
            with self._lock:
                for (index, flight), entry in zip(led.items(), entries, strict=True):
                    del self._flights[keys[index]]
                    flight.set_result(entry)

    def _fail(self, keys: Sequence[bytes], led: dict[int, Future[Entry]], error: BaseException) -> None:
        with self._lock:
            for index, flight in led.items():
                del self._flights[keys[index]]
                flight.set_exception(error)

    def _store(self, key: bytes, entry: Entry) -> None:
        """While moves are ours: put an entry into the first tier that can hold it, and what it evicts into the next.

        Copies are made between two short turns with the lock, and replace what they were made of in the second.
        """
        with self._lock:
            moves = self._plan(key, entry)
        copies = {name: tier.copy(moved.embedding) for name, (moved, tier) in moves.items() if tier is not None}
        with self._lock:
            for name in moves:
                if (before := self._tier(name)) is not None:
                    before.pop(name)
            for name, (moved, tier) in moves.items():
                if tier is not None:
                    moved.embedding = copies[name]
                    tier.put(name, moved)
                    continue
                self._evictions += moved is not entry  # an entry too large for every tier was in none of them
                for file in moved.files:
                    del self._files[file]

    def _plan(self, key: bytes, entry: Entry) -> dict[bytes, tuple[Entry, MemoryTier | None]]:
        """Under the lock: which entries move for this one, and where to; None: nowhere."""
        moves: dict[bytes, tuple[Entry, MemoryTier | None]] = {}
        moving = {key: entry}
        for tier in self._tiers:
            staying = {name: moved for name, moved in moving.items() if moved.nbytes <= tier.max_bytes}
            known = tier.entries | staying
            leaving = {name: known[name] for name in tier.room_for(key, staying)}
            passing = {name: moved for name, moved in moving.items() if name not in staying}
            moves |= {name: (moved, tier) for name, moved in staying.items() if name not in leaving}
            moving = passing | leaving
        return moves | {name: (moved, None) for name, moved in moving.items()}
