"""Memory on huge pages: a step reads all weights, and with pages of 4 KiB the CPU looks up thousands of addresses.

Linux gives huge pages on request (transparent_hugepage=madvise, the default of most distributions). Where it does
not, or the system is another one, everything works as before, a little slower.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from nanovllm.start_phases import START, Phase

_MAPS = Path("/proc/self/maps")
_WORTH_IT = 4 << 20  # bytes of a mapping: a smaller one has few whole huge pages in it
_PIECE = 32 << 20  # bytes of one call: a process that ends waits for it
_LOWEST_PRIORITY = 19
_HUGEPAGE = 14  # MADV_HUGEPAGE, which Python has on Linux alone
_COLLAPSE = 25  # MADV_COLLAPSE: now, instead of when the kernel comes by (Linux 6.1; an error before)


def zeroed(size: int) -> mmap.mmap:
    """``size`` bytes of zeros that take memory only where they are written, and huge pages there."""
    memory = mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has none
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def ask_for(tensors: Iterable[Tensor]) -> None:
    """Have the pages of ``tensors`` that lie in a mapped file read and mapped in huge ones where the system can."""
    for tensor in tensors:
        start = tensor.data_ptr()
        first = start - start % mmap.PAGESIZE
        _advise(first, start + tensor.nbytes, _HUGEPAGE)


@contextmanager
def for_new_memory() -> Iterator[None]:
    """Put what the block allocates, and keeps in large pieces, on huge pages, as far as the system has them.

    For memory that libraries allocate for themselves: oneDNN's and FBGEMM's packed weights. Pages are copied to huge
    ones in a thread of lowest priority, up to three seconds a gigabyte: whoever starts does not wait for it. A piece
    at the address of an equally large one that was freed within the block passes for the old one, and is left out.
    """
    before = _mappings()
    yield
    # Parsed afterwards: the objects of parsing can start a garbage collection, which frees what is taken for old here.
    # malloc's heap is never old: what is new can lie in what was free of it.
    found = _large(_mappings()) - _large(before, with_heap=False)
    for start, end in found:
        _advise(start, end, _HUGEPAGE)
    if found:
        threading.Thread(target=_collapse, args=(sorted(found),), name="huge-pages", daemon=True).start()


def _collapse(mappings: Iterable[tuple[int, int]]) -> None:
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
    with START.timed(Phase.HUGE_PAGES):
        for start, end in mappings:
            for piece in range(start, end, _PIECE):
                # What is no memory any more, or other memory by now, is refused or served: neither does harm.
                _advise(piece, min(piece + _PIECE, end), _COLLAPSE)


def _advise(start: int, end: int, advice: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def _mappings() -> str:
    try:
        return _MAPS.read_text()
    except OSError:
        return ""


def _large(mappings: str, *, with_heap: bool = True) -> set[tuple[int, int]]:
    """First and last address of the large private anonymous ones of a process's mappings."""
    found: set[tuple[int, int]] = set()
    for line in mappings.splitlines():
        addresses, rights, _, _, inode, *_ = line.split()
        start, end = (int(address, 16) for address in addresses.split("-"))
        is_wanted = rights == "rw-p" and inode == "0" and (with_heap or not line.endswith("[heap]"))
        if is_wanted and end - start >= _WORTH_IT:
            found.add((start, end))
    return found
