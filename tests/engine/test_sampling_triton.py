"""Triton's sampling kernels draw the CPU's tokens: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton_interpreter
from torch import Tensor
from triton_interpreter import DEVICE

from nanovllm.engine import kernels
from nanovllm.engine.sampling import kernel_selection
from nanovllm.engine.sampling.kernel_selection import SamplingKernels, choose_kernels, trial, triton_kernels
from nanovllm.engine.sampling.random_draw import draw_by_torch
from nanovllm.engine.sampling.sampler import Sampler
from nanovllm.engine.sampling.sampling_batch import RandomRows
from nanovllm.engine.sampling.structured_output import GuidedRows, forbid_by_torch
from nanovllm.engine.scheduling.sequence import Sequence
from nanovllm.sampling_params import SamplingParams

if (reason := triton_interpreter.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)
if (reason := kernels.missing()) is not None:
    pytest.skip(f"no CPU kernels to compare with: {reason}", allow_module_level=True)

from nanovllm.engine.kernels import sampling_triton

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's, of integers that overflow

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OFF = 2.0  # top_p


def by_cpu(logits: Tensor, limits: Tensor, keys: Tensor) -> list[int]:
    drawn: Tensor = torch.ops.nanovllm.draw_tokens(logits.contiguous(), torch.arange(len(limits)), limits, keys)
    return drawn.tolist()


def by_triton(logits: Tensor, limits: Tensor, keys: Tensor, share: int | None = None) -> list[int]:
    """Rows in another order, of logits that are part of a wider tensor."""
    wide = torch.full((len(logits) + 1, logits.shape[1] + 7), float("inf"), dtype=logits.dtype)
    rows = torch.arange(len(logits)).flip(0)
    wide[rows, : logits.shape[1]] = logits
    part = wide.to(DEVICE)[:, : logits.shape[1]]
    drawn = sampling_triton.draw_tokens(part, rows.to(DEVICE), limits.to(DEVICE), keys.to(DEVICE), share=share)
    return drawn.tolist()


def make_rows(count: int, vocab: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, limits and keys of rows, which differ in everything that a request may ask."""
    numbers, choice = torch.Generator().manual_seed(seed), random.Random(seed)
    spread = torch.tensor([[(0.0, 0.5, 4.0, 30.0)[row % 4]] for row in range(count)])
    logits = (spread * torch.randn(count, vocab, generator=numbers)).to(dtype)  # rounded: with ties
    forbidden = torch.tensor([[choice.choice((0.0, 0.0, 0.5, 0.99, 1.0))] for _ in range(count)])
    logits[torch.rand(count, vocab, generator=numbers) < forbidden] = float("-inf")
    logits[range(count), [choice.randrange(vocab) for _ in range(count)]] = 0.25
    limits = [
        (1 / choice.choice((1e-5, 0.7, 1.0, 4.0)), choice.choice((0.0, 0.0, 0.01, 0.3, 1.0)),
         choice.choice((OFF, 1e-9, 0.5, 0.9, 0.999)))
        for _ in range(count)
    ]  # fmt: skip
    keys = [
        (choice.randrange(2**63), choice.randrange(2**33), choice.choice((1, 2, 20, min(900, vocab), vocab, vocab)))
        for _ in range(count)
    ]
    return logits, torch.tensor(limits), torch.tensor(keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocab", "share"), [(1, None), (64, None), (301, 64)])
def test_mixed_rows_draw_the_tokens_that_the_cpu_draws(vocab: int, share: int | None, dtype: torch.dtype) -> None:
    logits, limits, keys = make_rows(4 if vocab == 1 else 9, vocab, dtype, vocab)
    assert by_triton(logits, limits, keys, share) == by_cpu(logits, limits, keys)


def test_a_vocabulary_of_many_tokens_is_cut_into_shares_without_an_effect() -> None:
    logits, limits, keys = make_rows(6, 5003, torch.bfloat16, 3)
    expected = by_cpu(logits, limits, keys)
    assert by_triton(logits, limits, keys, 1024) == by_triton(logits, limits, keys) == expected


@pytest.mark.proof
def test_a_thousand_rows_draw_the_tokens_that_the_cpu_draws() -> None:
    different = 0
    for seed in range(150):
        dtype, vocab = DTYPES[seed % 3], (5, 63, 64, 65, 1000, 5000)[seed % 6]
        logits, limits, keys = make_rows(8, vocab, dtype, seed)
        found = by_triton(logits, limits, keys, (64, 256, 1024, None)[seed % 4] if vocab < 5000 else 1024)
        different += sum(one != other for one, other in zip(found, by_cpu(logits, limits, keys), strict=True))
    assert different <= 1  # rounding decides about one draw in 100,000


@pytest.mark.parametrize("top_p", [OFF, 0.6])
@pytest.mark.parametrize("top_k", [200, 90])
def test_of_equal_logits_the_first_are_kept(top_k: int, top_p: float) -> None:
    """Every kept token is drawn as the CPU draws it; where one is cut off, a later one is never drawn."""
    logits = torch.zeros(4, 200)
    logits[:, 40:] -= 3.0  # two groups of ties; the cut is in the second, and in another share than its first
    limits, keys = torch.tensor([[0.5, 0.0, top_p]] * 4), torch.tensor([[7, place, top_k] for place in range(4)])
    found = by_triton(logits, limits, keys, 64)
    assert found == by_cpu(logits, limits, keys)
    assert max(found) < min(top_k, 200 if top_p == OFF else 150)


@pytest.mark.parametrize("infinite", [float("inf"), float("-inf")])
def test_rows_without_a_finite_best_logit_give_the_first_of_the_best(infinite: float) -> None:
    logits = torch.full((4, 100), float("-inf"))
    logits[:, 30:40] = infinite
    limits = torch.tensor([[1.0, 0.0, OFF], [1.0, 0.1, OFF], [1.0, 0.0, 0.5], [1.0, 0.0, OFF]])
    keys = torch.tensor([[1, 2, top_k] for top_k in (100, 100, 100, 5)])
    assert by_triton(logits, limits, keys, 64) == [30 if infinite > 0 else 0] * 4 == by_cpu(logits, limits, keys)


def test_what_is_no_number_is_not_drawn() -> None:
    logits = torch.full((2, 70), float("nan"))
    logits[0, 66] = 1.0
    limits, keys = torch.tensor([[1.0, 0.0, 0.9], [1.0, 0.0, OFF]]), torch.tensor([[1, 2, 20], [1, 2, 70]])
    first, other = by_triton(logits, limits, keys)
    assert first == 66
    assert 0 <= other < 70


def chi_squared(count: int, limits: list[float], top_k: int, logits: Tensor, probabilities: Tensor) -> float:
    keys = torch.tensor([[11, place, top_k] for place in range(count)])
    rows = torch.zeros(count, dtype=torch.int64)
    drawn = sampling_triton.draw_tokens(
        logits.to(DEVICE), rows.to(DEVICE), torch.tensor([limits] * count).to(DEVICE), keys.to(DEVICE),
        is_limited=limits[1] > 0, is_searched=limits[2] < 1 or top_k < logits.shape[1],
    )  # fmt: skip
    counts, expected = drawn.cpu().bincount(minlength=logits.shape[1]), probabilities * count
    assert not counts[expected == 0].any()
    is_kept = expected > 0
    return float(((counts - expected) ** 2 / expected)[is_kept].sum())


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[1.0, -0.5, 0.3, 0.9, 0.0]])
    expected = (logits[0] * 0.8).softmax(-1)
    assert chi_squared(120, [0.8, 0.0, OFF], 5, logits, expected) < 18.5  # one in a thousand passes it; a fixed seed


@pytest.mark.proof
def test_draws_within_limits_follow_the_distribution() -> None:
    logits = torch.tensor([[1.0, -0.5, 0.3, 0.9, 0.0, -2.0, -4.0]])
    expected = logits[0].softmax(-1)
    expected[expected < 0.3 * expected.max()] = 0.0
    assert chi_squared(3000, [1.0, 0.3, OFF], 7, logits, expected / expected.sum()) < 18.5
    expected = logits[0].softmax(-1)
    expected[expected.argsort(descending=True)[4:]] = 0.0
    assert chi_squared(3000, [1.0, 0.0, OFF], 4, logits, expected / expected.sum()) < 18.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_forbid_what_torch_forbids(dtype: torch.dtype) -> None:
    numbers = torch.Generator().manual_seed(1)
    masks = torch.randint(-(2**31), 2**31, (3, 80), generator=numbers).int()
    masks[1], masks[2] = -1, 0
    guided = GuidedRows(torch.tensor([4, 0, 2]), masks).to(DEVICE)
    wide = torch.randn(5, 2555, generator=numbers).to(dtype).to(DEVICE)
    expected = wide.clone()
    forbid_by_torch(expected[:, :2545], guided)
    sampling_triton.forbid_masked(wide[:, :2545], guided.rows, guided.masks)
    assert torch.equal(wide, expected)


def make_sequence(**options: Any) -> Sequence:
    return Sequence("", [0], 1, SamplingParams(**options), 16, stop_token_ids=frozenset({1, 5}))


@pytest.mark.parametrize("seed", range(2))
def test_a_step_of_all_kinds_of_rows_samples_what_it_samples_on_a_cpu(seed: int) -> None:
    sequences = [
        make_sequence(temperature=0.0),
        make_sequence(temperature=0.8, seed=3),
        make_sequence(temperature=1.0, top_p=0.8, top_k=20, min_tokens=2),
        make_sequence(temperature=0.0, min_tokens=2),
        make_sequence(temperature=2.0, min_p=0.05, repetition_penalty=1.3, presence_penalty=0.2, seed=9),
        make_sequence(temperature=1.0, logit_bias={7: 4.0, 8: -3.0}),
    ]
    numbers = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(sequences), 100, generator=numbers)
    masks = torch.randint(-(2**31), 2**31, (2, 4), generator=numbers).int()
    guided = GuidedRows(torch.tensor([1, 3]), masks)
    on_device = Sampler(DEVICE, seed, triton_kernels())
    expected = Sampler(torch.device("cpu"), seed).sample(logits.clone(), sequences, guided)
    assert on_device.sample(logits.to(DEVICE, copy=True), sequences, guided).tolist() == expected.tolist()


def test_only_what_rows_ask_for_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    for name in ("find_bests", "find_cuts", "draw_tokens"):
        launch = getattr(sampling_triton, name)
        monkeypatch.setattr(
            sampling_triton,
            name,
            lambda *arguments, name=name, launch=launch, **options: (
                launched.append(name) or launch(*arguments, **options)
            ),
        )
    sampler = Sampler(DEVICE, 0, triton_kernels())

    def launches(**options: Any) -> set[str]:
        launched.clear()
        sampler.sample(torch.randn(1, 50).to(DEVICE), [make_sequence(**options)])
        return set(launched)

    assert launches(temperature=0.0, top_p=0.5) == set()
    assert launches() == launches(top_k=0) == launches(top_k=50) == {"draw_tokens"}
    assert launches(min_p=0.1) == {"find_bests", "draw_tokens"}
    assert launches(top_k=5) == launches(top_p=0.9) == {"find_bests", "find_cuts", "draw_tokens"}


def test_the_trial_is_passed() -> None:
    assert trial(triton_kernels(), DEVICE, torch.bfloat16, 130) == 0


@pytest.mark.parametrize("lost", ["top_k", "top_p", "min_p", "temperature", "position"])
def test_the_trial_finds_draws_that_are_wrong(lost: str) -> None:
    def draw_without(logits: Tensor, random: RandomRows) -> Tensor:
        limits, keys = random.limits.clone(), random.keys.clone()
        {
            "top_k": keys[:, 2].fill_,
            "top_p": limits[:, 2].fill_,
            "min_p": limits[:, 1].fill_,
            "temperature": limits[:, 0].fill_,
            "position": keys[:, 1].fill_,
        }[lost]({"top_k": logits.shape[1], "top_p": OFF, "temperature": 1.0}.get(lost, 0))
        return draw_by_torch(logits.index_select(0, random.rows), limits, keys)

    cpu, right = torch.device("cpu"), SamplingKernels()
    assert trial(right, cpu, torch.float32, 1000) == 0
    assert trial(replace(right, draw_tokens=draw_without), cpu, torch.float32, 1000) > 3


def test_the_trial_finds_masks_that_are_not_applied() -> None:
    wrong = replace(SamplingKernels(), forbid_masked=lambda *_: None)
    assert trial(wrong, torch.device("cpu"), torch.float32, 1000) == 60


def test_kernels_that_fail_or_err_are_done_without_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> SamplingKernels:
        raise ImportError("libcuda.so.1 is missing")

    cuda = torch.device("cuda")
    caplog.set_level(logging.WARNING)
    assert choose_kernels(torch.device("cpu"), torch.float32, 100).reason == "they are for CUDA"
    assert not caplog.records
    monkeypatch.setattr(kernel_selection, "triton_kernels", fail)
    assert choose_kernels(cuda, torch.float32, 100) == SamplingKernels(reason="ImportError: libcuda.so.1 is missing")
    assert "libcuda.so.1 is missing" in caplog.text
    monkeypatch.setattr(kernel_selection, "triton_kernels", triton_kernels)
    monkeypatch.setattr(kernel_selection, "trial", lambda *_: 2)
    assert choose_kernels(cuda, torch.float32, 100).reason == "2 of 60 draws in the trial differ from torch's"
    monkeypatch.setattr(kernel_selection, "trial", lambda *_: 1)
    assert choose_kernels(cuda, torch.float32, 100).reason is None
