"""Attention by AMX tiles, emulated where the CPU has none, beside plain torch and the kernel of vectors."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nanovllm.engine import kernels
from nanovllm.engine.attention import tile_choice
from nanovllm.engine.attention.base import AttentionBatch
from nanovllm.engine.attention.cpu_paged import PagedCpuAttention
from nanovllm.engine.attention.selection import TOLERANCES, Heads, choose_backend, trial
from nanovllm.engine.layers import product_choice
from nanovllm.engine.layers.product_choice import Choice
from tests import amx

CPU, BFLOAT16 = torch.device("cpu"), torch.bfloat16
ROWS = ((1, 4), (1, 63), (1, 64), (1, 130), (3, 0), (3, 60), (40, 30))
Step = list[tuple[int, int, int]]  # of rows: sequence, start, end


@pytest.fixture(autouse=True)
def emulator() -> Iterator[amx.Emulator]:
    """Every test leaves no tile configured."""
    reason = kernels.missing() or amx.missing()
    if reason is not None:
        pytest.skip(reason)
    with amx.emulated() as tiles:
        yield tiles
        assert tiles.configured_threads() == 0


def attend(backend: PagedCpuAttention, heads: Heads, lengths: list[int], steps: list[Step]) -> list[Tensor]:
    """Outputs of sequences of ``lengths`` tokens, computed in ``steps``, over a cache whose blank places are NaN."""
    generator = torch.Generator().manual_seed(0)
    blocks = [-(-length // backend.block_size) for length in lengths]
    pages = random.Random(0).sample(range(sum(blocks)), sum(blocks))
    tables = [[pages.pop() for _ in range(count)] for count in blocks]
    cache = backend.allocate(sum(blocks), heads.num_kv, heads.dim, BFLOAT16)
    cache[..., : heads.dim] = float("nan")  # values; keys are written in tiles below
    parts = [torch.randn(3, n, heads.num, heads.dim, generator=generator).to(BFLOAT16) for n in lengths]
    found: list[list[Tensor]] = [[] for _ in lengths]
    for step in steps:
        counts, ends = [end - start for _, start, end in step], [end for *_, end in step]
        metadata = backend.metadata(AttentionBatch(counts, ends, [tables[which] for which, *_ in step]))
        query, key, value = torch.cat([parts[which][:, start:end] for which, start, end in step], 1)
        key, value = (each[:, : heads.num_kv].contiguous() for each in (key, value))
        output = backend.attend(query, key, value, cache, metadata)
        for (which, *_), part in zip(step, output.split(counts), strict=True):
            found[which].append(part)
    return [torch.cat(part) for part in found]


@pytest.mark.parametrize("block_size", [4, 16, 40])
@pytest.mark.parametrize("heads", [Heads(6, 2, 24), Heads(1, 1, 64), Heads(4, 1, 80), Heads(4, 2, 128)])
def test_tiles_attend_as_plain_torch_does_with_any_heads_and_pages(
    heads: Heads, block_size: int, emulator: amx.Emulator
) -> None:
    before = emulator.executed()["bfloat16"]
    error = trial(PagedCpuAttention(block_size, tiles_from=1), CPU, BFLOAT16, heads, ROWS)
    assert error <= TOLERANCES[BFLOAT16] / 3
    assert torch.cpu._is_amx_tile_supported() or emulator.executed()["bfloat16"] > before


def test_tiles_give_the_same_bits_in_any_chunk_and_any_batch() -> None:
    heads, lengths = Heads(6, 2, 48), [70, 7, 1, 150]
    whole = [(which, 0, length) for which, length in enumerate(lengths)]

    def outputs(steps: list[Step]) -> list[Tensor]:
        return attend(PagedCpuAttention(16, tiles_from=1), heads, lengths, steps)

    alone = outputs([[row] for row in whole])
    chunked = [
        [(which, start, min(start + 13, length)) for which, length in enumerate(lengths) if start < length]
        for start in range(0, max(lengths), 13)
    ]
    token_by_token = [
        [(which, place, place + 1) for which, length in enumerate(lengths) if place < length]
        for place in range(max(lengths))
    ]
    for steps in ([whole[::-1]], chunked, token_by_token):
        assert all(torch.equal(one, two) for one, two in zip(alone, outputs(steps), strict=True))


def test_rows_of_fewer_queries_than_tiles_pay_for_attend_by_vectors() -> None:
    heads, lengths = Heads(4, 2, 32), [40, 7, 30]
    steps: list[Step] = [[(0, 0, 39), (1, 0, 7), (2, 0, 30)], [(0, 39, 40)]]
    few = 2 * 8  # two query heads a key head, eight tokens
    vectors, tiles, mixed = (
        attend(PagedCpuAttention(16, tiles_from=tiles_from), heads, lengths, steps) for tiles_from in (None, 1, few)
    )
    assert not torch.equal(vectors[2], tiles[2])
    assert torch.equal(mixed[1], vectors[1])
    assert torch.equal(mixed[2], tiles[2])
    assert torch.equal(mixed[0][:39], tiles[0][:39])
    assert torch.equal(mixed[0][39:], vectors[0][39:])
    for one, two in zip(vectors, tiles, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-2)


def test_numbers_of_a_float32_model_are_never_multiplied_by_tiles(emulator: amx.Emulator) -> None:
    before = emulator.executed()["bfloat16"]
    for dtype in (torch.float32, torch.float16):
        assert trial(PagedCpuAttention(tiles_from=1), CPU, dtype, Heads(2, 1, 32), ((3, 5),)) <= TOLERANCES[dtype]
    assert emulator.executed()["bfloat16"] == before


def test_an_engine_attends_by_tiles_where_they_were_measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    with amx.granted(monkeypatch, Choice(tiles_from=8)):
        assert tile_choice.tiles_from(BFLOAT16) == 8
        backend = choose_backend(CPU, BFLOAT16)
        assert isinstance(backend, PagedCpuAttention)
        assert backend.tiles_from == 8
        assert backend.name == "our kernel on the pages, from 8 query vectors on by AMX tiles"
        assert trial(backend, CPU, BFLOAT16, Heads(4, 2, 32), ((1, 70), (5, 70))) <= TOLERANCES[BFLOAT16] / 3


def test_in_deterministic_mode_all_rows_attend_by_tiles_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with amx.granted(monkeypatch, Choice()):
        assert tile_choice.tiles_from(BFLOAT16) is None
        assert tile_choice.tiles_from(BFLOAT16, deterministic=True) == 1
        assert tile_choice.tiles_from(torch.float32, deterministic=True) is None
    monkeypatch.setattr(tile_choice.tiles, "why_not", lambda: "none")
    assert tile_choice.tiles_from(BFLOAT16, deterministic=True) is None


def test_attention_is_measured_by_numbers_of_query_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_choice, "_BUDGET_S", 0.0)
    found = tile_choice.measure()
    assert set(found) == {"vectors", "tiles"}
    assert isinstance(product_choice.choice_from(found), Choice)
