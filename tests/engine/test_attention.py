"""Paged attention against attention over whole, unpaged sequences."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import flash_attn_reference
import own_cache
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples
from torch import Tensor

from nanovllm.engine import kernels
from nanovllm.engine.attention import selection
from nanovllm.engine.attention.base import AttentionBackend, AttentionBatch, slots_of
from nanovllm.engine.attention.cpu_paged import PagedCpuAttention
from nanovllm.engine.attention.sdpa import SdpaAttention
from nanovllm.engine.attention.selection import CANDIDATES, TOLERANCES, Heads, choose_backend, first_right, trial
from nanovllm.engine.attention.varlen import PagedVarlenAttention, VarlenRows, torch_varlen_kernel
from nanovllm.errors import ConfigurationError

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
    assert slots_of(batch, SIZE).tolist() == expected


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

    def kernel(query: Tensor, keys: Tensor, values: Tensor, rows: VarlenRows) -> Tensor:
        calls.append((keys, values, rows))
        return query

    backend = PagedVarlenAttention(torch.device("cpu"), kernel, SIZE)
    cache = backend.allocate(4, KV_HEADS, DIM, torch.float32)
    metadata = backend.metadata(AttentionBatch([2, 3], [6, 3], [[2, 1], [3]]))
    key, value = torch.randn(2, 5, KV_HEADS, DIM)
    backend.attend(torch.zeros(5, HEADS, DIM), key, value, cache, metadata)
    ((keys, values, rows),) = calls
    assert rows.query_starts.tolist() == [0, 2, 5]
    assert rows.context_starts.tolist() == [0, 6, 9]
    assert rows.context_lens.tolist() == [6, 3]
    assert rows.block_tables.tolist() == [[2, 1], [3, 0]]
    assert {rows.query_starts.dtype, rows.context_lens.dtype, rows.block_tables.dtype} == {torch.int32}
    assert (rows.max_query, rows.max_context) == (3, 6)
    torch.testing.assert_close(keys[1, :2], key[:2])
    torch.testing.assert_close(values[3, :3], value[2:])


class LastRowIsGarbage(SdpaAttention):
    """Wrong as kernels have been: one row of several, and without an error."""

    garbage = 0.0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, metadata: object) -> Tensor:
        output = super().attend(query, key, value, cache, metadata)  # type: ignore[arg-type]
        output[-1] = self.garbage
        return output


class LastRowIsNoNumber(LastRowIsGarbage):
    garbage = float("nan")


class NotForThisGpu(SdpaAttention):
    def attend(self, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, metadata: object) -> Tensor:
        raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (LastRowIsGarbage, "its numbers are off by"),
        (LastRowIsNoNumber, "its numbers are off by nan"),
        (NotForThisGpu, "RuntimeError: no kernel image is available"),
    ],
)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_a_backend_that_is_wrong_or_raises_is_passed_over(
    kind: type[SdpaAttention], expected: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    candidates = {"bad": kind, "right": SdpaAttention, "next": SdpaAttention}
    with caplog.at_level(logging.WARNING):
        backend, reasons = first_right(candidates, CPU, dtype, 16, Heads(2, 1, 16))
    assert type(backend) is SdpaAttention
    (warning,) = [record.getMessage() for record in caplog.records]
    (reason,) = reasons
    assert warning.startswith(f"attention does without bad: {expected}")
    assert reason in warning


def test_the_trial_finds_every_backend_for_cpus_right() -> None:
    for dtype, tolerance in TOLERANCES.items():
        for heads in (Heads(6, 2, 24), Heads(1, 1, 64)):
            assert trial(SdpaAttention(CPU, dtype), CPU, dtype, heads) <= tolerance / 3
            if kernels.missing() is None:
                assert trial(PagedCpuAttention(), CPU, dtype, heads) <= tolerance / 3


def flash_attn(monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", module)  # type: ignore[arg-type]


def test_flash_attn_is_taken_where_it_is_there_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    only = {"flash-attn": CANDIDATES["flash-attn"]}
    backend, reasons = first_right(only, CPU, torch.bfloat16, None, Heads(2, 1, 16))
    assert backend is None
    assert reasons == ["flash-attn: not installed"]
    flash_attn(monkeypatch, flash_attn_reference)
    backend, reasons = first_right(only, CPU, torch.bfloat16, None, Heads(2, 1, 16))
    assert backend is not None
    assert (backend.name, backend.block_size, reasons) == ("flash-attn on the pages", 256, [])
    backend, reasons = first_right(only, CPU, torch.float32, None, Heads(2, 1, 16))
    assert backend is None
    assert reasons == ["flash-attn: not for torch.float32"]


def test_a_package_that_is_only_called_flash_attn_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flash_attn(monkeypatch, ModuleType("flash_attn"))
    only = {"flash-attn": CANDIDATES["flash-attn"]}
    assert first_right(only, CPU, torch.bfloat16, None, Heads(2, 1, 16))[0] is None
    assert "attention does without flash-attn: ImportError: cannot import name" in caplog.text


def test_flash_attn_refuses_pages_that_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attn(monkeypatch, flash_attn_reference)
    with pytest.raises(ConfigurationError, match=r"block_size=16: flash-attn.*multiple of 256.*leave block_size out"):
        first_right(CANDIDATES, CPU, torch.bfloat16, 16, Heads(2, 1, 16))


def test_torch_s_varlen_attn_sees_no_window_where_every_row_is_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    windows = set()

    def varlen_attn(
        query: Tensor, keys: Tensor, values: Tensor, starts: Tensor, ends: Tensor, most: int, longest: int,
        *, window_size: tuple[int, int], enable_gqa: bool, seqused_k: Tensor, block_table: Tensor,
    ) -> Tensor:  # fmt: skip
        assert enable_gqa
        assert torch.equal(seqused_k, ends.diff())
        windows.add((most == 1, window_size))
        return flash_attn_reference.flash_attn_varlen_func(
            query, keys, values, starts, ends, most, longest, causal=True, block_table=block_table
        )

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen_attn))  # type: ignore[arg-type]
    backend = PagedVarlenAttention(CPU, torch_varlen_kernel())
    assert trial(backend, CPU, torch.float32, Heads(2, 1, 16)) <= 1e-5
    assert windows == {(True, (-1, -1)), (False, (-1, 0))}


def test_scaled_dot_product_attention_never_goes_through_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    found = SdpaAttention(CPU, torch.bfloat16)
    monkeypatch.setattr(selection, "first_right", lambda *_: (found, []))
    try:
        assert choose_backend(torch.device("cuda"), torch.bfloat16) is found
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def test_rows_of_one_token_beside_a_prompt_have_a_call_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def kernel(query: Tensor, keys: Tensor, values: Tensor, rows: VarlenRows) -> Tensor:
        calls.append((len(query), rows.max_query, rows.max_context, rows.block_tables.shape[1]))
        return flash_attn_reference.flash_attn_varlen_func(
            query, keys, values, rows.query_starts, rows.context_starts, rows.max_query, rows.max_context,
            causal=True, block_table=rows.block_tables,
        )  # fmt: skip

    backend = PagedVarlenAttention(CPU, kernel)
    assert trial(backend, CPU, torch.float32, Heads(2, 1, 16), ((1, 9), (1, 300), (5, 20), (17, 700))) <= 1e-5
    # Those before; the single tokens and the others of a mixture, each with tables as wide as they need; one more each.
    assert calls == [(1029, 700, 700, 3), (2, 1, 301, 2), (22, 17, 717, 3), (4, 1, 768, 3)]


@pytest.mark.slow
def test_kernels_for_a_lesser_cpu_compile_anew_and_pass_the_same_tests(tmp_path: Path) -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or kernels.missing() is not None:
        pytest.skip("this is the lesser CPU")
    here = Path(__file__)
    parity = "test_parity.py::test_half_precision_is_as_near_to_float32_as_that_of_transformers"
    others = ("test_token_ops.py", "test_linear.py", "test_sampler.py", "test_panel_forms.py", parity)
    modules = [str(here), *(str(here.with_name(name)) for name in others)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", "not panels and not avx512", *modules],
        cwd=here.parents[2],
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout
    assert len(list((tmp_path / own_cache.NAME / "nanovllm").glob("cpu-*.so"))) == 1
