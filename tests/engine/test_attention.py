"""Paged attention against attention over whole, unpaged sequences."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from torch import Tensor

from nanovllm.engine import kernels
from nanovllm.engine.attention.base import AttentionBackend, AttentionBatch, slots_of
from nanovllm.engine.attention.cpu_paged import PagedCpuAttention
from nanovllm.engine.attention.sdpa import SdpaAttention
from nanovllm.engine.attention.selection import choose_backend
from nanovllm.engine.attention.varlen import PagedVarlenAttention

HEADS, KV_HEADS, DIM, SIZE, BLOCKS = 6, 2, 16, 4, 64
CPU = torch.device("cpu")

rows = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=8)


def tables(contexts: list[int], seed: int) -> list[list[int]]:
    """Blocks of every sequence, scattered over the cache."""
    free = list(range(BLOCKS * 2))
    random.Random(seed).shuffle(free)
    return [[free.pop() for _ in range(-(-context // SIZE))] for context in contexts]


def cpu_backend(kernel: bool, dtype: torch.dtype = torch.float32) -> AttentionBackend:
    """With our kernel, or without it; where it cannot be had, its tests are skipped and say why."""
    reason = kernels.missing()
    if kernel and reason is not None:
        pytest.skip(reason)
    return PagedCpuAttention(SIZE) if kernel else SdpaAttention(CPU, dtype, SIZE)


@pytest.mark.parametrize(("kernel", "dim"), [(True, 16), (True, 24), (False, 8)])
@examples(60)
@given(rows=rows, seed=st.integers(0, 1000))
def test_rows_of_any_lengths_equal_unpaged_attention(
    kernel: bool, dim: int, rows: list[tuple[int, int]], seed: int
) -> None:
    rows = sorted(rows, key=lambda row: (row[0] != 1, sum(row)))
    generator = torch.Generator().manual_seed(seed)
    contexts = [length + before for length, before in rows]
    block_tables = tables(contexts, seed)
    backend = cpu_backend(kernel)
    cache = backend.allocate(BLOCKS * 2, KV_HEADS, dim, torch.float32)
    keys = [torch.randn(context, KV_HEADS, dim, generator=generator) for context in contexts]
    values = [torch.randn(context, KV_HEADS, dim, generator=generator) for context in contexts]
    queries = [torch.randn(length, HEADS, dim, generator=generator) for length, _ in rows]

    for (_, before), table, key, value in zip(rows, block_tables, keys, values, strict=True):
        if before:
            metadata = backend.metadata(AttentionBatch([before], [before], [table]))
            backend.attend(torch.zeros(before, HEADS, dim), key[:before], value[:before], cache, metadata)
    new_keys, new_values = (
        torch.cat([whole[before:] for (_, before), whole in zip(rows, wholes, strict=True)])
        for wholes in (keys, values)
    )
    metadata = backend.metadata(AttentionBatch([length for length, _ in rows], contexts, block_tables))
    output = backend.attend(torch.cat(queries), new_keys, new_values, cache, metadata)

    expected = []
    for (length, before), query, key, value in zip(rows, queries, keys, values, strict=True):
        mask = torch.ones(length, length + before, dtype=torch.bool).tril(before)
        attended = F.scaled_dot_product_attention(
            *(tensor.transpose(0, 1) for tensor in (query, *(x.repeat_interleave(3, 1) for x in (key, value)))),
            attn_mask=mask,
        )
        expected.append(attended.transpose(0, 1))
    torch.testing.assert_close(output, torch.cat(expected))


@given(rows=rows, seed=st.integers(0, 1000))
def test_slots_are_the_table_s_blocks_in_order(rows: list[tuple[int, int]], seed: int) -> None:
    contexts = [length + before for length, before in rows]
    batch = AttentionBatch([length for length, _ in rows], contexts, tables(contexts, seed))
    expected = [
        table[position // SIZE] * SIZE + position % SIZE
        for (_, before), context, table in zip(rows, contexts, batch.block_tables, strict=True)
        for position in range(before, context)
    ]
    assert slots_of(batch, SIZE) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_gives_the_same_bits_in_any_chunk_and_any_batch(dtype: torch.dtype) -> None:
    backend = cpu_backend(kernel=True, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    lengths = [41, 7, 1, 90]
    block_tables = tables(lengths, 3)
    parts = [torch.randn(3, n, HEADS, DIM, generator=generator).to(dtype) for n in lengths]

    def outputs(steps: list[list[tuple[int, int, int]]]) -> list[Tensor]:
        """Every sequence's outputs, computed in ``steps`` of rows (sequence, start, end)."""
        cache = backend.allocate(BLOCKS * 2, KV_HEADS, DIM, dtype)
        found: list[list[Tensor]] = [[] for _ in lengths]
        for step in steps:
            batch = AttentionBatch(
                [end - start for _, start, end in step],
                [end for *_, end in step],
                [block_tables[which] for which, *_ in step],
            )
            query, key, value = torch.cat([parts[which][:, start:end] for which, start, end in step], 1)
            output = backend.attend(
                query, key[:, :KV_HEADS].clone(), value[:, :KV_HEADS].clone(), cache, backend.metadata(batch)
            )
            for (which, *_), part in zip(step, output.split(batch.query_lens), strict=True):  # type: ignore[arg-type]
                found[which].append(part)
        return [torch.cat(part) for part in found]

    alone = outputs([[(which, 0, length)] for which, length in enumerate(lengths)])
    together = outputs([[(which, 0, length) for which, length in reversed(list(enumerate(lengths)))]])
    chunked = outputs(
        [
            [(which, start, min(start + size, length)) for which, length in enumerate(lengths) if start < length]
            for size in (13,)
            for start in range(0, max(lengths), size)
        ]
    )
    token_by_token = outputs([[(which, place, place + 1)] for which, n in enumerate(lengths) for place in range(n)])
    for other in (together, chunked, token_by_token):
        assert all(torch.equal(one, two) for one, two in zip(alone, other, strict=True))


@pytest.mark.parametrize(
    ("compiler", "expected"), [("false", "could not compile"), ("/nowhere/c++", "/nowhere/c++"), ("", "install g++")]
)
def test_a_machine_without_a_compiler_is_told_so_and_does_without(
    compiler: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", str(tmp_path))
    kernels.missing.cache_clear()
    try:
        assert expected in str(kernels.missing())
        assert isinstance(choose_backend(CPU, torch.float32), SdpaAttention)
    finally:
        kernels.missing.cache_clear()


def test_kernels_that_read_pages_get_lengths_and_tables_as_they_expect() -> None:
    calls = []

    def kernel(query: Tensor, keys: Tensor, values: Tensor, metadata: object) -> Tensor:
        calls.append((keys, values, metadata))
        return query

    backend = PagedVarlenAttention(torch.device("cpu"), kernel, SIZE)
    cache = backend.allocate(4, KV_HEADS, DIM, torch.float32)
    metadata = backend.metadata(AttentionBatch([1, 3], [6, 3], [[2, 1], [3]]))
    key, value = torch.randn(2, 4, KV_HEADS, DIM)
    backend.attend(torch.zeros(4, HEADS, DIM), key, value, cache, metadata)
    ((keys, values, seen),) = calls
    assert seen is metadata
    assert metadata.query_starts.tolist() == [0, 1, 4]
    assert metadata.context_starts.tolist() == [0, 6, 9]
    assert metadata.context_lens.tolist() == [6, 3]
    assert metadata.block_tables.tolist() == [[2, 1], [3, 0]]
    assert {metadata.query_starts.dtype, metadata.context_lens.dtype, metadata.block_tables.dtype} == {torch.int32}
    assert (metadata.max_query, metadata.max_context) == (3, 6)
    torch.testing.assert_close(keys[1, 1], key[0])
    torch.testing.assert_close(values[3, :3], value[1:])


@pytest.mark.slow
def test_kernels_for_a_lesser_cpu_compile_anew_and_pass_the_same_tests(tmp_path: Path) -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or kernels.missing() is not None:
        pytest.skip("this is the lesser CPU")
    here = Path(__file__)
    modules = [str(here), str(here.with_name("test_token_ops.py")), str(here.with_name("test_linear.py"))]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", "not panels", *modules],
        cwd=here.parents[2],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout
    assert len(list((tmp_path / "nanovllm").glob("cpu-*.so"))) == 1
