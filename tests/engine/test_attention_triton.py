"""Our Triton kernel against plain torch, and in the engine beside the fused ones of a layer.

In Triton's interpreter, or on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tape
import torch
import triton_interpreter
from engine_parts import greedy
from torch import Tensor
from triton_interpreter import DEVICE

from nanovllm.engine import kernels
from nanovllm.engine.attention.base import AttentionBackend, AttentionBatch, GraphAttention
from nanovllm.engine.attention.sdpa import SdpaAttention
from nanovllm.engine.attention.selection import TOLERANCES, Heads, trial
from nanovllm.engine.diagnostics import describe
from nanovllm.engine.execution import model_runner
from nanovllm.engine.layers import fused
from nanovllm.engine.llm_engine import LLMEngine

if (reason := triton_interpreter.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from triton_operators import launch_by_operators

from nanovllm.engine.attention import triton_paged as attention_triton
from nanovllm.engine.attention.triton_paged import TritonAttention
from nanovllm.engine.kernels.paged_triton import Tile, choose_splits, choose_tile, paged_attention

ROWS = ((1, 0), (1, 3), (1, 16), (1, 130), (3, 70), (17, 0), (25, 10))


class PoisonedAttention(TritonAttention):
    """Memory that nobody wrote to holds no numbers: what is read of it shows."""

    def allocate(self, num_blocks: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
        return super().allocate(num_blocks, num_kv_heads, head_dim, dtype).fill_(float("nan"))


@pytest.mark.parametrize(
    ("dtype", "heads", "page", "splits"),
    [
        (torch.float32, Heads(6, 2, 24), 16, 1),
        (torch.float32, Heads(6, 2, 24), 49, 4),
        (torch.float32, Heads(1, 1, 256), 16, 4),
        (torch.bfloat16, Heads(6, 2, 24), 16, 4),
        (torch.bfloat16, Heads(6, 2, 24), 49, 1),
        (torch.bfloat16, Heads(7, 1, 64), 16, 1),
        (torch.bfloat16, Heads(7, 1, 64), 49, 4),
        (torch.bfloat16, Heads(4, 2, 128), 16, 4),
        (torch.bfloat16, Heads(2, 2, 80), 49, 1),
        (torch.float16, Heads(2, 2, 80), 16, 4),
        (torch.float16, Heads(40, 1, 16), 49, 1),
    ],
    ids=str,
)
def test_rows_of_any_lengths_equal_plain_attention(
    dtype: torch.dtype, heads: Heads, page: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The many tokens of the first step are not cut: putting them together takes an interpreter long.
    monkeypatch.setattr(attention_triton, "choose_splits", lambda _, tokens, *__, **___: 1 if tokens > 100 else splits)
    assert trial(PoisonedAttention(DEVICE, page), DEVICE, dtype, heads, ROWS) <= TOLERANCES[dtype]


def test_a_context_in_more_shares_than_it_has_tiles_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_triton, "choose_splits", lambda *_, **__: 16)
    rows = ((1, 0), (1, 63), (1, 64), (5, 20))
    assert trial(PoisonedAttention(DEVICE), DEVICE, torch.float32, Heads(2, 1, 16), rows) <= 1e-5


def test_queries_need_not_be_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def strided(query: Tensor, *rest: Any) -> Tensor:
        wide = torch.zeros(len(query), 3, *query.shape[1:], dtype=query.dtype, device=query.device)
        wide[:, 1] = query
        seen.append(wide[:, 1].is_contiguous())
        return paged_attention(wide[:, 1], *rest)

    monkeypatch.setattr(attention_triton, "paged_attention", strided)
    assert trial(PoisonedAttention(DEVICE), DEVICE, torch.float32, Heads(2, 1, 16), ((1, 5), (3, 20))) <= 1e-5
    assert not any(seen)


def test_shares_are_chosen_as_they_were_measured() -> None:
    tile = choose_tile(1, 2, 128, 2, (9, 0))
    assert tile == Tile(16, 64, 4, 2)

    def splits(rows: int, context: int) -> int:
        return choose_splits(rows, rows, context, kv_heads=8, tile=tile, group=2, cores=132)

    assert [splits(8, 8192), splits(32, 840), splits(64, 840), splits(256, 840)] == [8, 2, 1, 1]
    assert [splits(1, 40960), splits(1, 840), splits(1, 255), splits(1, 1)] == [16, 4, 1, 1]
    prompt = choose_tile(2048, 2, 128, 2, (9, 0))
    assert choose_splits(1, 2048, 8192, kv_heads=8, tile=prompt, group=2, cores=132) == 1
    assert choose_splits(1, 64, 8192, kv_heads=8, tile=prompt, group=2, cores=132) == 16


def test_plans_of_host_and_device_are_the_same() -> None:
    backend = TritonAttention(DEVICE, 4)
    assert isinstance(backend, GraphAttention)
    host = backend.metadata(AttentionBatch([1, 1], [6, 3], [[2, 1], [3]]))
    device = backend.decode_metadata(
        torch.tensor([6, 3], device=DEVICE), torch.tensor([[2, 1, 9], [3, 0, 9]], device=DEVICE)[:, :2]
    )
    for one in ("slots", "starts", "contexts", "tables"):
        assert torch.equal(getattr(host, one), getattr(device, one))
        assert getattr(host, one).dtype == getattr(device, one).dtype
    assert {host.starts.dtype, host.contexts.dtype, host.tables.dtype} == {torch.int32}
    assert (host.max_query, host.max_context, device.max_context) == (1, 6, 8)
    assert backend.decode_contexts(100, rows=1) == (100,)
    assert backend.decode_contexts(40960, rows=256) == (4096, 40960)


def _answers(
    text: Path, make: Callable[[], AttentionBackend], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[list[tuple[int, ...]], LLMEngine]:
    """Greedy tokens of three prompts with a common start, twice: the second time with a warm prefix cache."""
    monkeypatch.setattr(model_runner, "choose_backend", lambda *_: make())
    common = list(range(7, 41))
    prompts = [[*common, *range(50, 50 + length)] for length in (1, 9, 40)]
    options = {"max_num_seqs": 2, "num_speculative_tokens": 0, "max_model_len": 128, **options}
    with LLMEngine(str(text), device=DEVICE.type, dtype="float32", kv_cache_bytes=4 << 20, **options) as engine:
        outputs = [one for _ in range(2) for one in engine.generate(prompts, greedy(5), use_tqdm=False)]
        assert engine.stats().prefix_cache_hits > 0
        assert "Triton kernel" in _told(engine) or "SDPA" in _told(engine)
        replays = engine.model_runner.graphs.num_replays if engine.model_runner.graphs else 0
        assert (replays > 0) == (engine.model_runner.why_no_graphs is None)
        return [one.token_ids for one in outputs], engine


def _told(engine: LLMEngine) -> str:
    return next(f"{one.value} {one.note}" for one in describe(engine) if one.subject == "attention")


@pytest.mark.parametrize("way", ["recorded", "eager, chunks of 23"])
def test_the_engine_gives_the_tokens_that_it_gives_on_torch_s_operators(
    way: str, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "missing", lambda: "a GPU has none")
    monkeypatch.setattr(fused, "serves", lambda _: False)
    expected, _ = _answers(text, lambda: SdpaAttention(DEVICE, torch.float32), monkeypatch, enforce_eager=True)
    monkeypatch.setattr(fused, "serves", lambda _: True)
    if way == "recorded" and DEVICE.type == "cpu":
        monkeypatch.setattr(model_runner, "choose_recorder", lambda _: tape.record)
        launch_by_operators(monkeypatch)
    options = {} if way == "recorded" else {"enforce_eager": True, "max_num_batched_tokens": 23}
    found, _ = _answers(text, lambda: TritonAttention(DEVICE), monkeypatch, **options)
    assert found == expected
