"""Image embeddings, computed once: byte-bounded tiers, single flight, two names for one entry.

An entry is found by what the encoder sees (pixels and size) or, sooner, by the bytes of the file that the pixels came
from: then nothing is decoded either. All names hold the encoder's revision and the tenant's salt.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from nanovllm.statistics import CacheStats, TierStats

if TYPE_CHECKING:
    import torch
    from torch import Tensor
from nanovllm.vision.cache_tiers import Entry, MemoryTier, Tier

CacheOutcome = Literal["hit", "joined", "miss"]

MOST_FILES_AN_ENTRY = 8  # files of equal pixels that one entry is found by; of more, the latest

Note = TypeVar("Note")


def embedding_key(digest: bytes, encoder_revision: str, salt: bytes = b"", *, kind: str = "pixels") -> bytes:
    """The name (32 bytes) of an embedding: a digest of that ``kind``, the encoder, and the tenant's salt."""
    name = hashlib.sha256()
    for part in (kind.encode(), digest, encoder_revision.encode(), salt):
        name.update(len(part).to_bytes(8, "big") + part)
    return name.digest()


@dataclass
class _Flight:
    """One key's computation under way, and how it ended."""

    done: threading.Event = field(default_factory=threading.Event)
    entry: Entry | None = None
    error: BaseException | None = None


class EmbeddingCache(Generic[Note]):
    """Embeddings by key in one or more tiers, fastest first.

    Every method may be called from any thread. The tensors handed out are the stored ones: read them, never write.
    A bound of 0 stores nothing and still joins equal work.
    """

    def __init__(self, max_bytes: int, *further: Tier, device: torch.device | str | None = None) -> None:
        """``max_bytes`` are those of the tier beside the encoder, on ``device``; ``further`` tiers take what leaves it.

        Raises ConfigurationError for a negative bound.
        """
        self._tiers: tuple[Tier, ...] = (MemoryTier("device", max_bytes, device), *further)
        self._device = device
        self._lock = threading.Lock()
        self._flights: dict[bytes, _Flight] = {}
        self._files: dict[bytes, tuple[bytes, Note]] = {}
        self._hits = dict.fromkeys(self._tiers, 0)
        self._misses = self._joined = self._evictions = self._hits_by_file = 0
        self._seconds_saved = 0.0

    def get_or_compute(
        self, keys: Sequence[bytes], compute: Callable[[list[int]], Sequence[Tensor]]
    ) -> list[tuple[Tensor, CacheOutcome]]:
        """Return an embedding for every key, computing those that are neither held nor being computed.

        ``compute`` gets the indices into ``keys`` to compute and returns as many tensors, in order; it runs outside
        the lock, once. Views into a batch are fine: each is copied. A key that repeats within ``keys``, or is being
        computed by another thread, is ``joined``. Raises what ``compute`` raises, here and to all who joined.
        """
        found: dict[int, tuple[Tensor, CacheOutcome]] = {}
        led: dict[int, _Flight] = {}
        followed: dict[int, _Flight] = {}
        with self._lock:
            for index, key in enumerate(keys):
                embedding = self._hit(key)
                if embedding is not None:
                    found[index] = embedding, "hit"
                elif key in self._flights:
                    followed[index] = self._flights[key]
                    self._joined += 1
                else:
                    led[index] = self._flights[key] = _Flight()
                    self._misses += 1
        # Our own first: others wait for it, while what we wait for is under way already.
        if led:
            self._lead(keys, led, compute)
        for index, flight in (led | followed).items():
            flight.done.wait()
            if flight.entry is None:
                raise flight.error or RuntimeError("the computation of an embedding ended without one")
            found[index] = flight.entry.embedding, "miss" if index in led else "joined"
            if index in followed:
                with self._lock:
                    self._seconds_saved += flight.entry.seconds
        return [found[index] for index in range(len(keys))]

    def name(self, file: bytes, key: bytes, note: Note) -> None:
        """Let the entry of ``key``, if it is held, be found by ``file`` too, with ``note`` beside it."""
        with self._lock:
            entry = next((entry for tier in self._tiers if (entry := tier.get(key)) is not None), None)
            if entry is None or file in self._files:
                return
            self._files[file] = key, note
            entry.files.append(file)
            if len(entry.files) > MOST_FILES_AN_ENTRY:
                del self._files[entry.files.pop(0)]

    def find(self, file: bytes) -> tuple[Tensor, Note] | None:
        """The embedding that ``name`` gave this name, and the note, or None, which counts as nothing.

        The tensor is the caller's to hold as long as it wants: an eviction takes it from the cache only.
        """
        with self._lock:
            if file not in self._files:
                return None
            key, note = self._files[file]
            embedding = self._hit(key)
            assert embedding is not None  # an entry that leaves takes its names along
            self._hits_by_file += 1
            return embedding, note

    def touch(self, key: bytes) -> bool:
        """Whether the entry of ``key`` is held; it then is the most recently used one. Counts as no hit."""
        with self._lock:
            return self._use(key) is not None

    def stats(self) -> CacheStats:
        """Counts since the start, and what is held now."""
        with self._lock:
            tiers = tuple(
                TierStats(tier.name, hits, len(tier), tier.held_bytes, tier.max_bytes)
                for tier, hits in self._hits.items()
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
                seconds_saved=self._seconds_saved,
                tiers=tiers,
            )

    def audit(self) -> None:
        """Assert the invariants: the bytes counted are those held, within the bound, each tensor in own storage."""
        with self._lock:
            entries = [entry for tier in self._tiers for entry in tier.entries()]
            for tier in self._tiers:
                held = sum(entry.nbytes for entry in tier.entries())
                assert held == tier.held_bytes <= tier.max_bytes, (tier.name, held, tier.held_bytes, tier.max_bytes)
            for entry in entries:
                tight = entry.embedding.numel() * entry.embedding.element_size()
                assert entry.nbytes == tight, "an entry pins a larger buffer"
            storages = {entry.embedding.untyped_storage().data_ptr() for entry in entries}
            assert len(storages) == len(entries), "two entries share storage"
            names = sorted(name for entry in entries for name in entry.files)
            assert names == sorted(self._files), "names and entries differ"

    def _hit(self, key: bytes) -> Tensor | None:
        """Under the lock: the entry's embedding, beside the encoder, where any tier has it."""
        found = self._use(key)
        if found is None:
            return None
        tier, entry = found
        self._hits[tier] += 1
        self._seconds_saved += entry.seconds
        return entry.embedding if self._device is None else entry.embedding.to(self._device)

    def _use(self, key: bytes) -> tuple[Tier, Entry] | None:
        """Under the lock: the entry and the tier that held it; it moves to the first tier where it fits in there."""
        for tier in self._tiers:
            entry = tier.get(key)
            if entry is None:
                continue
            if tier is not self._tiers[0] and entry.nbytes <= self._tiers[0].max_bytes:
                self._store(key, tier.pop(key))
            return tier, entry
        return None

    def _lead(
        self, keys: Sequence[bytes], led: dict[int, _Flight], compute: Callable[[list[int]], Sequence[Tensor]]
    ) -> None:
        started = time.perf_counter()
        try:
            computed = compute(list(led))
            if len(computed) != len(led):
                raise ValueError(f"{len(led)} embeddings were asked for, {len(computed)} computed")
            seconds = (time.perf_counter() - started) / len(led)
            for flight, embedding in zip(led.values(), computed, strict=True):
                # A copy each: a view would keep the whole batch's buffer alive behind one entry.
                flight.entry = Entry(embedding.detach().clone(), seconds)
        except BaseException as error:
            for flight in led.values():
                flight.entry, flight.error = None, error
            raise
        finally:
            with self._lock:
                for index, flight in led.items():
                    del self._flights[keys[index]]
                    if flight.entry is not None:
                        # Another object: those who joined read theirs outside the lock.
                        self._store(keys[index], Entry(flight.entry.embedding, flight.entry.seconds))
                    flight.done.set()

    def _store(self, key: bytes, entry: Entry) -> None:
        """Under the lock: put an entry into the first tier that can hold it, and what leaves there into the next."""
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
            self._evictions += dropped is not entry  # what was too large for every tier was never in one
            for file in dropped.files:
                del self._files[file]
