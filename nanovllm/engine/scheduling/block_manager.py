"""KV blocks: allocation, reference counts, and the prefix cache over full blocks.

A block is in one of three states. *Held*: its reference count says by how many sequences. *Cached*: no sequence holds
it, but its hash is known, so a later prefix can reuse it. *Blank*: neither. Blank and cached blocks are both free:
blank ones are allocated first, then cached ones in order of last use (LRU).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from nanovllm.errors import EngineFault


class BlockManager:
    """Allocator of ``num_blocks`` blocks of ``block_size`` tokens: hashes and numbers, no tokens and no tensors."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """The share of blocks that are held, 0 to 1."""
        return 1.0 - self.num_free / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that ``num_tokens`` tokens need."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of ``hashes``; none of them is held by this."""
        blocks: list[int] = []
        if self.enable_prefix_caching:
            for key in hashes:
                block = self._block_of.get(key)
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def can_allocate(self, num_new: int, cached: Sequence[int] = ()) -> bool:
        """Whether ``num_new`` blocks are free besides the ``cached`` ones, which may be free themselves."""
        return num_new + sum(self._ref_counts[block] == 0 for block in cached) <= self.num_free

    def allocate(self, num_new: int, cached: Sequence[int] = ()) -> list[int]:
        """Hold ``cached`` and ``num_new`` other blocks, in this order; raises EngineFault when too few are free.

        A sequence's block table, block after block; a free tail exists up to the end of the last block only::

            | cached prefix         | computed              | this step's row | free tail |
            0               num_cached_tokens     num_computed_tokens      row.end   table's end
            | shared: held by       | full ones: named by   | held by this sequence alone |
            | several sequences     | cache_block, findable | until they are full         |
            `-- allocate(cached) --' `---------------- allocate(num_new) ---------------'
        """
        if not self.can_allocate(num_new, cached):
            raise EngineFault(f"{num_new} blocks wanted, {self.num_free} of {self.num_blocks} are free")
        for block in cached:
            self._ref_counts[block] += 1
            self._free.pop(block, None)
        new = [self._free.popitem(last=False)[0] for _ in range(num_new)]
        for block in new:
            self._forget(block)
            self._ref_counts[block] = 1
        return [*cached, *new]

    def _forget(self, block: int) -> None:
        key = self._hash_of[block]
        if key is not None:
            del self._block_of[key]
            self._hash_of[block] = None

    def cache_block(self, block: int, key: bytes) -> None:
        """Make a held block, now full and computed, findable by its hash.

        The first block with a hash keeps it. An equal one, computed beside it in the same step, gets none and is blank
        once it is freed: the map names exactly one block for a hash.
        """
        if self.enable_prefix_caching and self._hash_of[block] is None and key not in self._block_of:
            self._hash_of[block] = key
            self._block_of[key] = block

    def free(self, blocks: Sequence[int]) -> None:
        """Release one sequence's blocks.

        In reverse, so that a prefix's last block is evicted first: the blocks before it stay findable without it. A
        block that other sequences hold stays held; a named one becomes cached, another one blank.
        """
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def audit(self, tables: Iterable[Sequence[int]]) -> None:
        """Check every invariant against the block tables of all live sequences; raises AssertionError."""
        held = Counter(block for table in tables for block in table)
        for block, references in enumerate(self._ref_counts):
            assert references == held[block], f"block {block}: {references} references, {held[block]} holders"
            assert (references == 0) == (block in self._free), f"block {block}: free list and references disagree"
            key = self._hash_of[block]
            assert key is None or self._block_of.get(key) == block, f"block {block}: its hash names another block"
        assert set(held) <= set(range(self.num_blocks)), "a table names a block that does not exist"
        for key, block in self._block_of.items():
            assert self._hash_of[block] == key, f"the map names block {block} by a hash that it does not have"
