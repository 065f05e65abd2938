"""Turns of benchmarks: what their figures say, which pairs count, and what the workloads ask."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks.before_after import Clock, OutOfTime, good_pairs, summarise
from benchmarks.checkpoints import checkpoint
from benchmarks.compare import table
from benchmarks.turn_statistics import agreement, median_interval
from benchmarks.workloads import QWEN_SAMPLING, make_decode, make_prompts, make_sampling, make_text


def pair(ratio: float, others: float = 0.0) -> dict[str, Any]:
    return {"before": 100.0, "after": 100.0 * ratio, "ratio": ratio, "others_cpu_share": [0.0, others]}


def settings(**changed: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"pairs": 3, "warm_ups": 2, "most_other_load": 0.05, "most_repeats": 4, **changed})


def take_from(loads: list[float], turns: list[int]) -> Callable[[int], dict[str, Any]]:
    """Pairs during which others took these shares of the CPUs; notes which turns were asked for."""

    def take(turn: int) -> dict[str, Any]:
        turns.append(turn)
        return pair(1.0, loads[len(turns) - 1])

    return take


def test_an_interval_holds_the_median_and_is_the_same_every_time() -> None:
    ratios = [0.96, 1.02, 0.98, 1.01, 0.97]
    low, high = median_interval(ratios)
    assert low <= 0.98 <= high
    assert (low, high) == median_interval(ratios)
    assert min(ratios) <= low < high <= max(ratios)
    assert median_interval([1.5]) == (1.5, 1.5)


def test_an_interval_narrows_with_more_turns() -> None:
    few, many = [0.9, 1.0, 1.1], [0.9 + 0.2 * place / 40 for place in range(41)]
    width = {len(values): high - low for values in (few, many) for low, high in [median_interval(values)]}
    assert width[41] < width[3]


@pytest.mark.parametrize(
    ("ratios", "holds"),
    [
        ([0.98, 0.97, 0.99, 0.98, 0.975], True),  # slower by less than 3%
        ([0.90, 0.91, 0.92, 0.90, 0.93], False),
        ([0.80, 1.05, 0.95, 1.10, 0.96], True),  # nobody can tell: the interval includes 1
        ([1.20, 1.21, 1.19, 1.22, 1.20], True),
    ],
)
def test_a_workload_holds_unless_it_is_slower_beyond_doubt(ratios: list[float], holds: bool) -> None:
    assert summarise([pair(ratio) for ratio in ratios])["holds"] is holds


def test_pairs_beside_other_load_are_taken_again() -> None:
    cell: dict[str, Any] = {"pairs": [], "repeated": 0}
    turns: list[int] = []
    for found in good_pairs(settings(), take_from([0.9, 0.9, 0.0, 0.2, 0.05, 0.06, 0.01], turns), Clock(None), cell):
        cell["pairs"].append(found)
    assert [max(found["others_cpu_share"]) for found in cell["pairs"]] == [0.0, 0.05, 0.01]
    assert cell["repeated"] == 2
    assert len(set(turns)) == len(turns)  # each has prompts of its own


def test_a_machine_that_is_never_quiet_ends_the_run() -> None:
    cell: dict[str, Any] = {"pairs": [], "repeated": 0}
    with pytest.raises(RuntimeError, match="let the machine be quiet, or raise --most-other-load"):
        list(good_pairs(settings(), take_from([0.5] * 20, []), Clock(None), cell))


def test_a_budget_ends_before_a_pair_and_a_later_run_goes_on() -> None:
    cell: dict[str, Any] = {"pairs": [pair(1.0)] * 2, "repeated": 0}
    with pytest.raises(OutOfTime):
        list(good_pairs(settings(), take_from([0.0] * 9, []), Clock(0.0), cell))
    turns: list[int] = []
    for found in good_pairs(settings(), take_from([0.0] * 9, turns), Clock(60.0), cell):
        cell["pairs"].append(found)
    assert len(cell["pairs"]) == 3
    assert len(turns) == 3  # two warm-ups and the pair that was missing


def test_agreement_counts_equal_answers_and_the_tokens_before_a_difference() -> None:
    assert agreement([[[1, 2, 3], [4, 5]]], [[[1, 2, 3], [4, 6]]]) == {
        "answers_equal": 1,
        "answers": 2,
        "tokens_before_difference": 0.8,
    }
    assert agreement([[[1]], None], [None, None]) == {}


def test_workloads_have_the_lengths_that_they_say_and_prompts_of_their_own(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("tiny", tmp_path))
    prompts = make_prompts(1, tokenizer, tmp_path)
    assert [(len(one.prompt), one.max_tokens) for one in prompts.requests] == [(600, 8)] * 16
    assert prompts.requests != make_prompts(2, tokenizer, tmp_path).requests
    text, sampled = make_text(1, tokenizer, tmp_path), make_sampling(1, tokenizer, tmp_path)
    assert sampled.requests == text.requests
    assert (text.sampling, sampled.sampling) == (None, QWEN_SAMPLING)
    assert (sampled.kind, prompts.kind, make_decode(8, 4, 4)(1, tokenizer, tmp_path).kind) == (
        "sampling",
        "prompts",
        "decode",
    )


def test_checkpoints_are_stored_in_bfloat16_as_published_ones_are(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for name in ("tiny", "tiny-vision"):
        tensors = load_file(checkpoint(name, tmp_path) / "model.safetensors")
        assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}, name


def test_a_table_of_peers_names_the_cpu_and_leaves_out_who_cannot() -> None:
    def row(workload: str, **speeds: float) -> dict[str, Any]:
        engines: dict[str, dict[str, float]] = {
            name: {"tokens_per_second": speed, "ours_is_faster_by": round(speeds["nanovllm"] / speed, 3)}
            for name, speed in speeds.items()
        }
        engines["nanovllm"]["linear_share"] = 0.75
        return {"workload": workload, "precision": "bf16", "cpu": "Xeon", "amx": True, "engines": engines}

    report = {"results": [row("text", nanovllm=100.0, vllm=80.0), row("schema", nanovllm=50.0)]}
    assert table(report).splitlines() == [
        "| | CPU | AMX | nanovllm | vllm | linear |",
        "|---|---|---|---|---|---|",
        "| text, bf16 | Xeon | yes | 100.0 | 80.0 (1.25) | 75% |",
        "| schema, bf16 | Xeon | yes | 50.0 | – | 75% |",
    ]
