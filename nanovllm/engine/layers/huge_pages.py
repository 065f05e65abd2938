"""Memory on huge pages: a step reads all weights, and with pages of 4 KiB the CPU looks up thousands of addresses.

Linux gives huge pages on request (transparent_hugepage=madvise, the default of most distributions). Where it does
not, or the system is another one, everything works as before, a little slower.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanovllm.start_phases import START, Phase

_MAPS = Path("/proc/self/maps")
_WORTH_IT = 4 << 20  # bytes of a mapping: a smaller one has few whole huge pages in it
_COLLAPSE = 25  # MADV_COLLAPSE: now, instead of when the kernel comes by (Linux 6.1; an error before)


def zeroed(size: int) -> mmap.mmap:
    """``size`` bytes of zeros that take memory only where they are written, and huge pages there."""
    memory = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has none
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


@contextmanager
def for_new_memory() -> Iterator[None]:
    """Put what the block allocates, and keeps in large pieces, on huge pages, as far as the system has them.

    For memory that libraries allocate for themselves: oneDNN's and FBGEMM's packed weights.
    """
    before = _large_mappings()
    yield
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    madvise = ctypes.CDLL(None).madvise
    with START.timed(Phase.HUGE_PAGES):
        for start, end in _large_mappings() - before:
            for advice in (mmap.MADV_HUGEPAGE, _COLLAPSE):
                madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def _large_mappings() -> set[tuple[int, int]]:
    """First and last address of the process's large private anonymous mappings."""
    found: set[tuple[int, int]] = set()
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        addresses, rights, _, _, inode, *_ = line.split()
        start, end = (int(address, 16) for address in addresses.split("-"))
        if rights == "rw-p" and inode == "0" and end - start >= _WORTH_IT:
            found.add((start, end))
    return found
