from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.errors import ConfigurationError
from nanovllm.vision.cache import EmbeddingCache, embedding_key
from nanovllm.vision.transform import PreparedImage

ROWS = 4
ENTRY_BYTES = ROWS * 4


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def embedding(number: int) -> Tensor:
    return torch.full((ROWS,), float(number))


def views_of_one_batch(numbers: Sequence[int]) -> Callable[[list[int]], Sequence[Tensor]]:
    """Computes as the encoder does: one batch, handed out as views."""
    return lambda indices: list(torch.stack([embedding(numbers[index]) for index in indices]))


def ask(cache: EmbeddingCache, *numbers: int) -> list[str]:
    found = cache.get_or_compute([key(number) for number in numbers], views_of_one_batch(numbers))
    for number, (tensor, _) in zip(numbers, found, strict=True):
        assert torch.equal(tensor, embedding(number))
    cache.audit()
    return [outcome for _, outcome in found]


def test_the_first_is_a_miss_the_next_a_hit_and_a_repeat_in_one_call_joins() -> None:
    cache = EmbeddingCache(1000)
    assert ask(cache, 1, 2, 1) == ["miss", "miss", "joined"]
    assert ask(cache, 2, 3, 2, 3) == ["hit", "miss", "hit", "joined"]
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.joined, stats.evictions) == (2, 3, 2, 0)
    assert (stats.entries, stats.bytes, stats.max_bytes) == (3, 3 * ENTRY_BYTES, 1000)


def test_a_cached_entry_pins_its_own_bytes_and_not_the_whole_batch() -> None:
    cache = EmbeddingCache(100_000)
    batch = torch.randn(8, 49, 16)
    cache.get_or_compute([key(number) for number in range(8)], lambda indices: batch[indices].unbind())
    for number in range(8):
        entry = cache.get(key(number))
        assert entry is not None
        assert entry.untyped_storage().nbytes() == entry.numel() * entry.element_size() == 49 * 16 * 4
    cache.audit()


def test_only_the_missing_are_computed_in_one_call_and_in_order() -> None:
    cache = EmbeddingCache(1000)
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
    cache = EmbeddingCache(3 * ENTRY_BYTES)
    ask(cache, 1, 2, 3)
    ask(cache, 1)
    assert cache.get(key(2)) is not None
    ask(cache, 4)
    assert cache.get(key(3)) is None
    assert [ask(cache, number) for number in (1, 2, 4)] == [["hit"]] * 3
    assert cache.stats().evictions == 1


def test_an_item_larger_than_the_cache_is_returned_and_evicts_nothing() -> None:
    cache = EmbeddingCache(3 * ENTRY_BYTES)
    ask(cache, 1, 2)
    large = torch.ones(4 * ENTRY_BYTES)
    (found,) = cache.get_or_compute([key(9)], lambda _: [large])
    assert torch.equal(found[0], large)
    assert cache.get(key(9)) is None
    assert cache.stats().entries == 2
    assert cache.stats().evictions == 0


def test_one_byte_too_few_for_the_last_entry_evicts_exactly_one() -> None:
    cache = EmbeddingCache(3 * ENTRY_BYTES - 1)
    ask(cache, 1, 2, 3)
    assert (cache.stats().entries, cache.stats().evictions) == (2, 1)


def test_a_cache_of_no_bytes_still_computes_equal_images_once() -> None:
    cache = EmbeddingCache(0)
    assert ask(cache, 1, 1, 1) == ["miss", "joined", "joined"]
    assert ask(cache, 1) == ["miss"]
    assert cache.stats().entries == 0
    with pytest.raises(ConfigurationError, match="-1 bytes"):
        EmbeddingCache(-1)


def test_clearing_forgets_entries_and_keeps_the_counts() -> None:
    cache = EmbeddingCache(1000)
    ask(cache, 1, 2)
    cache.clear()
    cache.audit()
    assert (cache.stats().entries, cache.stats().bytes, cache.stats().misses) == (0, 0, 2)
    assert ask(cache, 1) == ["miss"]


def test_an_evicted_tensor_stays_whole_for_whoever_holds_it() -> None:
    cache = EmbeddingCache(ENTRY_BYTES)
    ((held, _),) = cache.get_or_compute([key(1)], lambda _: [embedding(1)])
    ask(cache, 2)
    assert cache.get(key(1)) is None
    assert torch.equal(held, embedding(1))


def test_a_failed_computation_raises_and_leaves_nothing_behind() -> None:
    cache = EmbeddingCache(1000)

    def fail(_: list[int]) -> list[Tensor]:
        raise RuntimeError("the tower broke")

    with pytest.raises(RuntimeError, match="the tower broke"):
        cache.get_or_compute([key(1), key(1)], fail)
    with pytest.raises(ValueError, match="2 embeddings were asked for, 1 computed"):
        cache.get_or_compute([key(1), key(2)], lambda _: [embedding(1)])
    assert ask(cache, 1, 2) == ["miss", "miss"]


def test_threads_that_want_one_image_compute_it_once() -> None:
    cache = EmbeddingCache(1000)
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
    cache = EmbeddingCache(1000)
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


def test_a_failed_leader_does_not_poison_its_followers() -> None:
    cache = EmbeddingCache(1000)
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

        found = cache.get_or_compute([key(1), key(2)], compute)
        outcomes["follower"] = found[0][1]
        assert torch.equal(found[0][0], embedding(1))

    join(start(leader, follower))
    assert outcomes == {"leader": "failed", "follower": "miss"}
    assert ask(cache, 1, 2) == ["hit", "hit"]


def test_many_threads_over_few_keys_never_see_a_wrong_tensor_or_break_the_bound() -> None:
    cache = EmbeddingCache(5 * ENTRY_BYTES)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        try:
            for _ in range(150):
                numbers = [int(number) for number in generator.integers(0, 12, generator.integers(1, 6))]
                is_broken = generator.random() < 0.1

                def compute(
                    indices: list[int], numbers: list[int] = numbers, is_broken: bool = is_broken
                ) -> Sequence[Tensor]:
                    if is_broken:
                        raise RuntimeError("broken on purpose")
                    return views_of_one_batch(numbers)(indices)

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


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6), st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=5), max_size=20))
def test_the_cache_behaves_as_an_ordered_dictionary_of_bounded_size(capacity: int, calls: list[list[int]]) -> None:
    cache = EmbeddingCache(capacity * ENTRY_BYTES)
    model: list[int] = []
    for numbers in calls:
        hits = [number for number in numbers if number in model]
        missing = [number for number in dict.fromkeys(numbers) if number not in model]
        outcomes = ask(cache, *numbers)
        assert outcomes.count("hit") == len(hits)
        assert outcomes.count("miss") == len(missing)
        for number in hits:
            model.remove(number)
            model.append(number)
        model = (model + missing)[-capacity:] if capacity else []
        assert cache.stats().entries == len(model)


def test_keys_differ_by_pixels_encoder_and_tenant_and_parts_do_not_run_together() -> None:
    def image(digest: bytes) -> PreparedImage:
        return PreparedImage(np.zeros((1, 1, 3), np.uint8), digest, 1, 1)

    one, other = image(bytes(32)), image(b"\1" * 32)
    keys = [
        embedding_key(one, "r1"),
        embedding_key(other, "r1"),
        embedding_key(one, "r2"),
        embedding_key(one, "r1", b"tenant"),
        embedding_key(one, "r1t", b"enant"),
    ]
    assert len(set(keys)) == 5
    assert all(len(one_key) == 32 for one_key in keys)
    assert embedding_key(one, "r1") == keys[0]


def start(*works: Callable[[], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    return threads


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
