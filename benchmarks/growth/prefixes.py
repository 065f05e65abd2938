"""Prefix hashes against prompt and images, and the block manager against its blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.growth.tree import Row, best, find, make_sequence, method, once, rows_of


def measure(is_tiny: bool) -> list[Row]:
    """Hashing and matching a prompt; freeing and evicting a block."""
    prompts = (128, 1_024) if is_tiny else (1_024, 8_192, 32_768, 131_072)
    blocks = (100, 1_000) if is_tiny else (1_000, 100_000, 1_000_000)
    return [*rows_of(_hashing, "tokens", prompts), *rows_of(_blocks, "blocks", blocks)]


def _hashing(tokens: int) -> dict[tuple[str, str], float]:
    hashes = _sequence(tokens).block_hashes(16)
    manager = _manager(len(hashes) + 1)
    held = method(manager, "allocate", "take")(len(hashes))
    for block, key in zip(held, hashes, strict=True):
        method(manager, "cache_block", "remember")(block, key)
    return {
        ("block hashes of a prompt", "ms"): 1e3 * _hashed(tokens),
        ("the same with 16 images", "ms"): 1e3 * _hashed(tokens, 16),
        ("cached prefix matched", "µs"): 1e6 * best(lambda: method(manager, "match_prefix", "match")(hashes)),
    }


def _hashed(tokens: int, images: int = 0) -> float:
    """Seconds of hashing a prompt whose hashes are not known."""
    return min(once(partial(_sequence(tokens, images).block_hashes, 16)) for _ in range(3))


def _blocks(count: int) -> dict[tuple[str, str], float]:
    manager = _manager(count)
    keys = [number.to_bytes(8, "big") * 4 for number in range(count)]
    held = method(manager, "allocate", "take")(count)
    for block, key in zip(held, keys, strict=True):
        method(manager, "cache_block", "remember")(block, key)
    freeing = once(lambda: method(manager, "free", "release")(held))
    evicted = min(count, 10_000)
    return {
        ("a block freed", "µs"): 1e6 * freeing / count,
        ("a block allocated by eviction", "µs"): 1e6
        * once(lambda: method(manager, "allocate", "take")(evicted))
        / evicted,
    }


def _manager(blocks: int) -> Any:
    return find("engine.scheduling.block_manager:BlockManager", "engine.block_manager:BlockManager")(blocks, 16)


def _sequence(tokens: int, images: int = 0) -> Any:
    ImageSpan = find("engine.scheduling.sequence:ImageSpan", "engine.sequence:ImageSpan")
    each = tokens // max(1, images)
    length = min(256, each - 1)
    spans = tuple(ImageSpan(None, bytes(32), number * each, length) for number in range(images))
    return make_sequence("0", list(range(tokens)), tokens, 1, images=spans)
