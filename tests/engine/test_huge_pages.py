"""Memory on huge pages: zeros that cost nothing until written, and what libraries allocate for themselves."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanovllm.engine.attention.cpu_paged import PagedCpuAttention
from nanovllm.engine.layers import huge_pages

MIB = 1 << 20
IN_THE_HEAP = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from nanovllm.engine.layers import huge_pages
from test_huge_pages import MIB, asks_for_them

torch.ones(6 * MIB)  # freed: from now on glibc takes pieces of less than 24 MiB from its heap
pieces = [torch.ones(5 * MIB) for _ in range(6)]
last = torch.ones(MIB)  # so that what is freed below it stays the heap's
del pieces
with huge_pages.for_new_memory():
    weight = torch.ones(16 * MIB)
print(asks_for_them(weight))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux only")


def field_of(tensor: torch.Tensor, field: str) -> str:
    """What the kernel says of the mapping that a tensor lies in."""
    address = tensor.data_ptr()
    for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", mapping)
        if found and int(found[1], 16) <= address < int(found[2], 16):
            return re.search(rf"(?m)^{field}:(.*)$", mapping)[1]  # type: ignore[index]
    raise AssertionError("no mapping holds the tensor")


def asks_for_them(tensor: torch.Tensor) -> bool:
    # What it gets is up to the kernel: on a system whose free memory is in small pieces, fewer or none.
    return "hg" in field_of(tensor, "VmFlags").split()


def can_have_them() -> bool:
    return Path("/sys/kernel/mm/transparent_hugepage/enabled").exists()


def test_a_kv_cache_takes_memory_only_where_it_is_written() -> None:
    cache = PagedCpuAttention(16).allocate(1024, 2, 128, torch.float32)
    assert cache.nbytes == 32 * MIB
    assert not cache[5].any()
    cache[0] = 1.0
    # Neighbouring mappings of one kind are one to the kernel, so this is about more than the cache.
    assert int(field_of(cache, "Rss").split()[0]) < 31 * 1024


@pytest.mark.skipif(not can_have_them(), reason="this system has no huge pages")
def test_a_kv_cache_asks_for_huge_pages() -> None:
    cache = PagedCpuAttention(16).allocate(1024, 2, 128, torch.float32)
    cache.fill_(1.0)
    assert asks_for_them(cache)


@pytest.mark.skipif(not can_have_them(), reason="this system has no huge pages")
def test_what_is_kept_of_a_block_s_memory_asks_for_huge_pages() -> None:
    gc.collect()  # what earlier tests left, freed within the block, would leave its address to the weight
    before = torch.ones(16 * MIB)
    with huge_pages.for_new_memory():
        weight = torch.ones(16 * MIB)  # 64 MiB
    assert weight.sum() == before.sum() == 16 * MIB
    assert asks_for_them(weight)


@pytest.mark.skipif(not can_have_them(), reason="this system has no huge pages")
def test_what_lies_in_a_free_part_of_the_heap_asks_for_huge_pages() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_HEAP, str(Path(__file__).parent)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "True"


def test_memory_that_cannot_be_looked_at_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_MAPS", tmp_path / "no such file")
    with huge_pages.for_new_memory():
        weight = torch.ones(4 * MIB)
    assert weight.sum() == 4 * MIB
