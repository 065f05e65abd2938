"""What a decode step prepares on the host does not grow with the context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_qwen_vl
from engine_parts import greedy, noise_image
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine import kernels
from nanovllm.engine.attention.base import AttentionBatch, padded_tables, slots_of
from nanovllm.engine.attention.cpu_paged import PagedCpuAttention
from nanovllm.engine.execution import model_runner
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduling.sequence import DraftedTokens, Sequence
from nanovllm.sampling_params import SamplingParams


def test_our_kernel_reads_block_tables_where_they_are_written() -> None:
    tables = np.arange(60, dtype=np.int32).reshape(3, 20)
    backend = PagedCpuAttention(16)
    slots, _, _, found, seats = backend.metadata(AttentionBatch([1, 1], [17, 300], tables, seats=[2, 0]))
    assert found.data_ptr() == tables.ctypes.data
    assert seats.tolist() == [2, 0]
    assert slots.tolist() == [41 * 16, 18 * 16 + 11]


def test_seats_name_the_rows_of_a_table() -> None:
    tables = np.arange(60, dtype=np.int32).reshape(3, 20)
    by_seats = AttentionBatch([2, 3], [20, 40], tables, seats=[2, 0])
    by_rows = AttentionBatch([2, 3], [20, 40], tables[[2, 0]])
    assert padded_tables(by_seats, 16).tolist() == padded_tables(by_rows, 16).tolist()
    assert slots_of(by_seats, 16).tolist() == slots_of(by_rows, 16).tolist()


@given(
    known=st.lists(st.integers(0, 9), max_size=5),
    drafts=st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple),
    start=st.none() | st.integers(-9, 9),
    end=st.none() | st.integers(-9, 9),
)
def test_a_sequence_ahead_has_its_tokens_and_drafts_as_a_list_would(
    known: list[int], drafts: tuple[int, ...], start: int | None, end: int | None
) -> None:
    expected = [*known, *drafts]
    found = DraftedTokens(known, drafts)
    known.append(7)  # what is sampled later is not among them
    assert list(found) == expected
    assert found[start:end] == expected[start:end]
    assert found[-1] == expected[-1]


def test_a_sequence_ahead_shares_its_tokens() -> None:
    sequence = Sequence("r", [1, 2, 3], 2, SamplingParams(), 10)
    ahead = sequence.ahead((4, 5))
    assert ahead.token_ids._known is sequence.token_ids  # type: ignore[attr-defined]
    assert ahead.num_output_tokens == 3
    assert ahead.count_tokens().arrays()[0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.skipif(kernels.missing() is not None, reason=str(kernels.missing()))
def test_images_are_looked_through_once_for_all_tokens_behind_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    positions_of = model_runner.positions_of

    def counted(config: Any, images: Any, start: int, end: int) -> Any:
        calls.append((start, end))
        return positions_of(config, images, start, end)

    monkeypatch.setattr(model_runner, "positions_of", counted)
    with LLMEngine(str(make_qwen_vl(tmp_path)), num_speculative_tokens=4) as engine:
        engine.add_request("a a a <|image|> a a a a", greedy(30), images=[noise_image(1)], request_id="r")
        engine.step()
        (sequence,) = engine.scheduler.running
        before = len(calls)
        for _ in range(8):
            engine.step()
        assert calls[before:] == [(sequence.num_prompt_tokens, sequence.num_prompt_tokens + 1)]
