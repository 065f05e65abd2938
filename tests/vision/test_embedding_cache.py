from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from torch import Tensor

from nanovllm.errors import ConfigurationError
from nanovllm.vision.embedding_cache import MOST_FILES_AN_ENTRY, EmbeddingCache, MemoryTier, embedding_key

ROWS = 4
ENTRY_BYTES = ROWS * 4


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def embedding(number: int) -> Tensor:
    return torch.full((ROWS,), float(number))


def views_of_one_batch(numbers: Sequence[int]) -> Callable[[list[int]], Sequence[Tensor]]:
    """Computes as the encoder does: one batch, handed out as views."""
    return lambda indices: list(torch.stack([embedding(numbers[index]) for index in indices]))


def ask(cache: EmbeddingCache[str], *numbers: int) -> list[str]:
    found = cache.get_or_compute([key(number) for number in numbers], views_of_one_batch(numbers))
    for number, (tensor, _) in zip(numbers, found, strict=True):
        assert torch.equal(tensor, embedding(number))
    cache.audit()
    return [outcome for _, outcome in found]


def test_the_first_is_a_miss_the_next_a_hit_and_a_repeat_in_one_call_joins() -> None:
    cache = EmbeddingCache[str](1000)
    assert ask(cache, 1, 2, 1) == ["miss", "miss", "joined"]
    assert ask(cache, 2, 3, 2, 3) == ["hit", "miss", "hit", "joined"]
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.joined, stats.evictions) == (2, 3, 2, 0)
    assert (stats.entries, stats.bytes, stats.max_bytes) == (3, 3 * ENTRY_BYTES, 1000)


def test_a_cached_entry_pins_its_own_bytes_and_not_the_whole_batch() -> None:
    cache = EmbeddingCache[str](100_000)
    batch = torch.randn(8, 49, 16)
    cache.get_or_compute([key(number) for number in range(8)], lambda indices: batch[indices].unbind())
    cache.audit()
    assert cache.stats().bytes == 8 * 49 * 16 * 4
    for number, (entry, outcome) in enumerate(cache.get_or_compute([key(n) for n in range(8)], never)):
        assert outcome == "hit"
        assert entry.untyped_storage().nbytes() == 49 * 16 * 4
        assert torch.equal(entry, batch[number])


def test_only_the_missing_are_computed_in_one_call_and_in_order() -> None:
    cache = EmbeddingCache[str](1000)
    ask(cache, 2)
    calls: list[list[int]] = []

    def compute(indices: list[int]) -> list[Tensor]:
        calls.append(indices)
        return [embedding(index) for index in indices]

    cache.get_or_compute([key(1), key(2), key(1), key(3)], compute)
    assert calls == [[0, 3]]
    cache.get_or_compute([key(1), key(2), key(3)], compute)
    assert calls == [[0, 3]]


def test_the_least_recently_used_goes_first() -> None:
    cache = EmbeddingCache[str](3 * ENTRY_BYTES)
    ask(cache, 1, 2, 3)
    ask(cache, 1)
    ask(cache, 2)
    ask(cache, 4)
    assert [ask(cache, number) for number in (1, 2, 4)] == [["hit"]] * 3
    assert cache.stats().evictions == 1


def test_an_item_larger_than_the_cache_is_returned_and_evicts_nothing() -> None:
    cache = EmbeddingCache[str](3 * ENTRY_BYTES)
    ask(cache, 1, 2)
    large = torch.ones(4 * ENTRY_BYTES)
    (found,) = cache.get_or_compute([key(9)], lambda _: [large])
    assert torch.equal(found[0], large)
    assert cache.stats().entries == 2
    assert cache.stats().evictions == 0


def test_one_byte_too_few_for_the_last_entry_evicts_exactly_one() -> None:
    cache = EmbeddingCache[str](3 * ENTRY_BYTES - 1)
    ask(cache, 1, 2, 3)
    assert (cache.stats().entries, cache.stats().evictions) == (2, 1)


def test_a_cache_of_no_bytes_still_computes_equal_images_once() -> None:
    cache = EmbeddingCache[str](0)
    assert ask(cache, 1, 1, 1) == ["miss", "joined", "joined"]
    assert ask(cache, 1) == ["miss"]
    assert cache.stats().entries == 0
    with pytest.raises(ConfigurationError, match="-1 bytes"):
        EmbeddingCache[str](-1)


def test_a_touched_entry_outlives_the_others_in_every_tier_and_counts_as_no_hit() -> None:
    cache = EmbeddingCache[str](2 * ENTRY_BYTES, MemoryTier("host", ENTRY_BYTES))
    ask(cache, 1, 2, 3)
    assert [cache.touch(key(number)) for number in (1, 4)] == [True, False]
    assert (cache.stats().hits, cache.stats().misses, cache.stats().seconds_saved) == (0, 3, 0)
    ask(cache, 5)
    assert ask(cache, 1) == ["hit"]
    assert [tier.hits for tier in cache.stats().tiers] == [1, 0]
    cache.audit()


def test_an_evicted_tensor_stays_whole_for_whoever_holds_it() -> None:
    cache = EmbeddingCache[str](ENTRY_BYTES)
    ((held, _),) = cache.get_or_compute([key(1)], lambda _: [embedding(1)])
    ask(cache, 2)
    assert cache.stats().evictions == 1
    assert torch.equal(held, embedding(1))


def test_a_failed_computation_raises_and_leaves_nothing_behind() -> None:
    cache = EmbeddingCache[str](1000)

    def fail(_: list[int]) -> list[Tensor]:
        raise RuntimeError("the tower broke")

    with pytest.raises(RuntimeError, match="the tower broke"):
        cache.get_or_compute([key(1), key(1)], fail)
    with pytest.raises(ValueError, match="2 embeddings were asked for, 1 computed"):
        cache.get_or_compute([key(1), key(2)], lambda _: [embedding(1)])
    assert ask(cache, 1, 2) == ["miss", "miss"]


def test_threads_that_want_one_image_compute_it_once() -> None:
    cache = EmbeddingCache[str](1000)
    num_threads = 8
    computing, may_finish = threading.Event(), threading.Event()
    computations: list[int] = []
    outcomes: list[str] = []

    def compute(indices: list[int]) -> list[Tensor]:
        computations.append(len(indices))
        computing.set()
        assert may_finish.wait(60)
        return [embedding(1)]

    def work() -> None:
        ((tensor, outcome),) = cache.get_or_compute([key(1)], compute)
        assert torch.equal(tensor, embedding(1))
        outcomes.append(outcome)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    threads[0].start()
    assert computing.wait(60)
    for thread in threads[1:]:
        thread.start()
    may_finish.set()
    join(threads)
    assert computations == [1]
    assert sorted(set(outcomes)) in (["joined", "miss"], ["hit", "joined", "miss"], ["hit", "miss"])
    assert outcomes.count("miss") == 1
    cache.audit()


def test_a_followers_wait_counts_as_joined() -> None:
    cache = EmbeddingCache[str](1000)
    computing, follower_asked = threading.Event(), threading.Event()
    outcomes: dict[str, str] = {}

    def leader() -> None:
        def compute(_: list[int]) -> list[Tensor]:
            computing.set()
            assert follower_asked.wait(60)
            return [embedding(1)]

        outcomes["leader"] = cache.get_or_compute([key(1)], compute)[0][1]

    def follower() -> None:
        assert computing.wait(60)

        def compute(_: list[int]) -> list[Tensor]:
            # Runs after the follower has claimed its place behind the leader's key 1.
            follower_asked.set()
            return [embedding(2)]

        found = cache.get_or_compute([key(1), key(2)], compute)
        outcomes["follower"] = found[0][1]
        assert torch.equal(found[0][0], embedding(1))

    join(start(leader, follower))
    assert outcomes == {"leader": "miss", "follower": "joined"}


def test_a_failed_leader_fails_those_who_joined_and_leaves_nothing_behind() -> None:
    cache = EmbeddingCache[str](1000)
    computing, follower_waits = threading.Event(), threading.Event()
    outcomes: dict[str, str] = {}

    def leader() -> None:
        def compute(_: list[int]) -> list[Tensor]:
            computing.set()
            assert follower_waits.wait(60)
            raise RuntimeError("the tower broke")

        with pytest.raises(RuntimeError, match="the tower broke"):
            cache.get_or_compute([key(1)], compute)
        outcomes["leader"] = "failed"

    def follower() -> None:
        assert computing.wait(60)

        def compute(indices: list[int]) -> list[Tensor]:
            follower_waits.set()
            return [embedding(index + 1) for index in indices]

        with pytest.raises(RuntimeError, match="the tower broke"):
            cache.get_or_compute([key(1), key(2)], compute)
        outcomes["follower"] = "failed"

    join(start(leader, follower))
    assert outcomes == {"leader": "failed", "follower": "failed"}
    assert ask(cache, 1, 2) == ["miss", "hit"]


def test_many_threads_over_few_keys_never_see_a_wrong_tensor_or_break_the_bound() -> None:
    cache = EmbeddingCache[str](5 * ENTRY_BYTES, MemoryTier("host", 3 * ENTRY_BYTES))
    failures: list[BaseException] = []
    computing: set[int] = set()
    lock = threading.Lock()

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        try:
            for _ in range(150):
                numbers = [int(number) for number in generator.integers(0, 12, generator.integers(1, 6))]
                is_broken = generator.random() < 0.1

                def compute(
                    indices: list[int], numbers: list[int] = numbers, is_broken: bool = is_broken
                ) -> Sequence[Tensor]:
                    wanted = {numbers[index] for index in indices}
                    with lock:
                        assert not wanted & computing, "one key is computed twice at once"
                        computing.update(wanted)
                    try:
                        time.sleep(0.0005)
                        if is_broken:
                            raise RuntimeError("broken on purpose")
                        return views_of_one_batch(numbers)(indices)
                    finally:
                        with lock:
                            computing.difference_update(wanted)

                try:
                    found = cache.get_or_compute([key(number) for number in numbers], compute)
                except RuntimeError:
                    continue
                for number, (tensor, _) in zip(numbers, found, strict=True):
                    assert torch.equal(tensor, embedding(number))
                cache.audit()
        except BaseException as error:
            failures.append(error)

    join(start(*(lambda seed=seed: work(seed) for seed in range(6))))
    assert failures == []


@examples(60)
@given(st.integers(0, 4), st.integers(0, 4), st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=5), max_size=20))
def test_the_cache_behaves_as_ordered_dictionaries_of_bounded_size(
    capacity: int, host: int, calls: list[list[int]]
) -> None:
    cache = EmbeddingCache[str](capacity * ENTRY_BYTES, MemoryTier("host", host * ENTRY_BYTES))
    near: list[int] = []
    far: list[int] = []
    evicted = 0

    def put(number: int) -> None:
        nonlocal evicted
        leaving = [number]
        for tier, bound in ((near, capacity), (far, host)):
            tier += leaving
            leaving, tier[:] = tier[: max(0, len(tier) - bound)], tier[max(0, len(tier) - bound) :]
        evicted += len(leaving) if capacity + host else 0

    for numbers in calls:
        known = near + far
        outcomes = ask(cache, *numbers)
        hits = [number for number in numbers if number in known]
        assert outcomes.count("hit") == len(hits)
        for number in hits:
            tier = near if number in near else far
            tier.remove(number)
            if tier is near or not capacity:
                tier.append(number)
            else:
                put(number)
        missing = [number for number in dict.fromkeys(numbers) if number not in known]
        assert outcomes.count("miss") == len(missing)
        for number in missing:
            put(number)
        stats = cache.stats()
        assert [tier.entries for tier in stats.tiers] == [len(near), len(far)]
        assert stats.evictions == evicted


def test_what_leaves_the_device_is_found_in_host_memory_bit_for_bit_and_comes_back() -> None:
    cache = EmbeddingCache[str](2 * ENTRY_BYTES, MemoryTier("host", 2 * ENTRY_BYTES, "cpu"))
    ask(cache, 1, 2, 3)
    assert [(tier.name, tier.entries, tier.hits) for tier in cache.stats().tiers] == [("device", 2, 0), ("host", 1, 0)]
    assert ask(cache, 1) == ["hit"]
    assert [(tier.entries, tier.hits) for tier in cache.stats().tiers] == [(2, 0), (1, 1)]
    assert ask(cache, 1) == ["hit"]
    assert [tier.hits for tier in cache.stats().tiers] == [1, 1]
    ask(cache, 4, 5)
    assert cache.stats().evictions == 1


class GatedTier(MemoryTier):
    """A tier whose copies wait until they may go on, as behind the work of a device."""

    def __init__(self, name: str, max_bytes: int) -> None:
        super().__init__(name, max_bytes, "cpu")
        self.copying, self.may_copy = threading.Event(), threading.Event()
        self.threads: set[str] = set()

    def copy(self, embedding: Tensor) -> Tensor:
        """As a `MemoryTier`, and of another storage, as between two devices."""
        self.threads.add(threading.current_thread().name)
        self.copying.set()
        assert self.may_copy.wait(60)
        return embedding.clone()


def test_while_a_tier_copies_everything_is_found_and_nothing_else_waits() -> None:
    host = GatedTier("host", 2 * ENTRY_BYTES)
    cache = EmbeddingCache[str](2 * ENTRY_BYTES, host)
    ask(cache, 1, 2)
    for number in (1, 2):
        cache.name(bytes([number]), key(number), str(number))
    mover = threading.Thread(target=lambda: ask(cache, 3), name="engine")
    mover.start()
    assert host.copying.wait(60)
    seen: list[object] = []

    def look() -> None:
        for number in (1, 2):
            found = cache.find(bytes([number]))
            assert found is not None
            assert torch.equal(found[0], embedding(number))
            assert cache.holds(key(number))
        cache.name(b"other", key(1), "again")
        seen.append(cache.stats())
        cache.audit()

    join(start(look))
    assert len(seen) == 1
    assert mover.is_alive()
    host.may_copy.set()
    join([mover])
    assert host.threads == {"engine"}
    assert [tier.entries for tier in cache.stats().tiers] == [2, 1]
    assert cache.find(b"other") is not None
    cache.audit()


def test_what_is_found_behind_the_device_stays_there_until_the_engine_takes_it() -> None:
    host = GatedTier("host", ENTRY_BYTES)
    host.may_copy.set()
    cache = EmbeddingCache[str](ENTRY_BYTES, host)
    ask(cache, 1)
    cache.name(b"1", key(1), "one")
    ask(cache, 2)
    host.threads.clear()
    found = cache.find(b"1")
    assert found is not None
    assert not host.threads
    assert cache.touch(key(2))
    assert not host.threads, "it is where it belongs"
    assert torch.equal(cache.on_device(key(1), found[0]), embedding(1))
    assert torch.equal(cache.on_device(key(1), found[0]), embedding(1))
    assert [ask(cache, 1), ask(cache, 2)] == [["hit"]] * 2
    assert [tier.hits for tier in cache.stats().tiers] == [1, 2]
    ask(cache, 3)
    cache.audit()
    assert torch.equal(cache.on_device(key(1), found[0]), embedding(1)), "the caller holds what the cache dropped"


def test_a_copy_that_fails_leaves_every_entry_where_it_was() -> None:
    class BrokenTier(MemoryTier):
        """A tier without memory for copies."""

        def copy(self, embedding: Tensor) -> Tensor:
            """None."""
            raise torch.OutOfMemoryError("no memory")

    cache = EmbeddingCache[str](ENTRY_BYTES, BrokenTier("host", ENTRY_BYTES))
    ask(cache, 1)
    with pytest.raises(torch.OutOfMemoryError):
        ask(cache, 2)
    cache.audit()
    assert ask(cache, 1) == ["hit"]
    with pytest.raises(torch.OutOfMemoryError):
        ask(cache, 2)
    assert [tier.entries for tier in cache.stats().tiers] == [1, 0]


def test_what_is_too_large_for_the_device_lives_in_host_memory() -> None:
    cache = EmbeddingCache[str](0, MemoryTier("host", ENTRY_BYTES))
    assert [ask(cache, 1), ask(cache, 1)] == [["miss"], ["hit"]]
    assert cache.stats().evictions == 0


def test_an_entry_is_found_by_its_files_and_takes_their_names_along() -> None:
    cache = EmbeddingCache[str](ENTRY_BYTES)
    cache.name(b"early", key(1), "no such entry")
    assert cache.find(b"early") is None
    ask(cache, 1)
    cache.name(b"a.png", key(1), "as png")
    cache.name(b"a.bmp", key(1), "as bmp")
    cache.name(b"a.bmp", key(2), "a name is given once")
    for file, note in ((b"a.png", "as png"), (b"a.bmp", "as bmp")):
        found = cache.find(file)
        assert found is not None
        assert torch.equal(found[0], embedding(1))
        assert found[1] == note
    assert (cache.stats().hits, cache.stats().hits_by_file) == (2, 2)
    cache.audit()
    ask(cache, 2)
    assert cache.find(b"a.png") is None
    cache.audit()


def test_the_names_of_an_entry_are_bounded() -> None:
    cache = EmbeddingCache[str](ENTRY_BYTES)
    ask(cache, 1)
    for number in range(MOST_FILES_AN_ENTRY + 2):
        cache.name(bytes([number]), key(1), "")
    assert [cache.find(bytes([number])) is None for number in range(MOST_FILES_AN_ENTRY + 2)] == (
        [True, True] + [False] * MOST_FILES_AN_ENTRY
    )
    cache.audit()


def test_the_seconds_saved_are_those_that_the_first_time_took() -> None:
    cache = EmbeddingCache[str](1000)

    def slowly(indices: list[int]) -> list[Tensor]:
        time.sleep(0.02 * len(indices))
        return [embedding(1) for _ in indices]

    cache.get_or_compute([key(1)], slowly)
    assert cache.stats().seconds_saved == 0
    ask(cache, 1)
    once = cache.stats().seconds_saved
    assert once >= 0.02
    ask(cache, 1)
    assert cache.stats().seconds_saved == pytest.approx(2 * once)


def test_keys_differ_by_digest_encoder_tenant_and_kind_and_parts_do_not_run_together() -> None:
    keys = [
        embedding_key(bytes(32), "r1"),
        embedding_key(b"\1" * 32, "r1"),
        embedding_key(bytes(32), "r2"),
        embedding_key(bytes(32), "r1", b"tenant"),
        embedding_key(bytes(32), "r1t", b"enant"),
        embedding_key(bytes(32), "r1", kind="file"),
    ]
    assert len(set(keys)) == 6
    assert all(len(one_key) == 32 for one_key in keys)
    assert embedding_key(bytes(32), "r1") == keys[0]


def never(indices: list[int]) -> list[Tensor]:
    raise AssertionError(f"{indices} were computed again")


def start(*works: Callable[[], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    return threads


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
