"""Paged attention against attention over whole, unpaged sequences."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.engine.attention import AttentionBatch, PagedVarlenAttention, SdpaAttention, choose_backend, slots_of
from nanovllm.engine.linear import Linear

HEADS, KV_HEADS, DIM, SIZE, BLOCKS = 6, 2, 8, 4, 64

rows = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=8)


def tables(contexts: list[int], seed: int) -> list[list[int]]:
    """Blocks of every sequence, scattered over the cache."""
    free = list(range(BLOCKS * 2))
    random.Random(seed).shuffle(free)
    return [[free.pop() for _ in range(-(-context // SIZE))] for context in contexts]


@settings(max_examples=60, deadline=None)
@given(rows=rows, seed=st.integers(0, 1000))
def test_rows_of_any_lengths_equal_unpaged_attention(rows: list[tuple[int, int]], seed: int) -> None:
    rows = sorted(rows, key=lambda row: (row[0] != 1, sum(row)))
    generator = torch.Generator().manual_seed(seed)
    contexts = [length + before for length, before in rows]
    block_tables = tables(contexts, seed)
    backend = SdpaAttention(torch.device("cpu"), torch.float32, SIZE)
    cache = backend.allocate(BLOCKS * 2, KV_HEADS, DIM, torch.float32)
    keys = [torch.randn(context, KV_HEADS, DIM, generator=generator) for context in contexts]
    values = [torch.randn(context, KV_HEADS, DIM, generator=generator) for context in contexts]
    queries = [torch.randn(length, HEADS, DIM, generator=generator) for length, _ in rows]

    for (_, before), table, key, value in zip(rows, block_tables, keys, values, strict=True):
        if before:
            plan = backend.plan(AttentionBatch([before], [before], [table]))
            backend.attend(torch.zeros(before, HEADS, DIM), key[:before], value[:before], cache, plan)
    new_keys, new_values = (
        torch.cat([whole[before:] for (_, before), whole in zip(rows, wholes, strict=True)])
        for wholes in (keys, values)
    )
    plan = backend.plan(AttentionBatch([length for length, _ in rows], contexts, block_tables))
    output = backend.attend(torch.cat(queries), new_keys, new_values, cache, plan)

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


def test_the_cpu_has_its_backend() -> None:
    backend = choose_backend(torch.device("cpu"), torch.bfloat16, 32)
    assert isinstance(backend, SdpaAttention)
    assert backend.block_size == 32


def test_kernels_that_read_pages_get_lengths_and_tables_as_they_expect() -> None:
    calls = []

    def kernel(query: Tensor, keys: Tensor, values: Tensor, plan: object) -> Tensor:
        calls.append((keys, values, plan))
        return query

    backend = PagedVarlenAttention(torch.device("cpu"), kernel, SIZE)
    cache = backend.allocate(4, KV_HEADS, DIM, torch.float32)
    plan = backend.plan(AttentionBatch([1, 3], [6, 3], [[2, 1], [3]]))
    key, value = torch.randn(2, 4, KV_HEADS, DIM)
    backend.attend(torch.zeros(4, HEADS, DIM), key, value, cache, plan)
    ((keys, values, seen),) = calls
    assert seen is plan
    assert plan.query_starts.tolist() == [0, 1, 4]
    assert plan.context_starts.tolist() == [0, 6, 9]
    assert plan.context_lens.tolist() == [6, 3]
    assert plan.block_tables.tolist() == [[2, 1], [3, 0]]
    assert {plan.query_starts.dtype, plan.context_lens.dtype, plan.block_tables.dtype} == {torch.int32}
    assert (plan.max_query, plan.max_context) == (3, 6)
    torch.testing.assert_close(keys[1, 1], key[0])
    torch.testing.assert_close(values[3, :3], value[1:])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 16, 33])
def test_packed_weights_multiply_as_plain_ones(bias: bool, num_rows: int) -> None:
    layer = Linear(512, 768, bias=bias)
    with torch.inference_mode():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        x = torch.randn(num_rows, 512)
        expected = layer(x)
        layer.pack()
        assert layer.weight.numel() == 0
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-3)
