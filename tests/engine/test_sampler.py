"""Which token is taken, row by row, whoever the neighbours are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanovllm.engine import kernels
from nanovllm.engine.sampling.random_draw import draw_by_torch, draw_tokens, philox
from nanovllm.engine.sampling.sampler import Sampler
from nanovllm.engine.sampling.sampling_batch import RandomRows
from nanovllm.engine.sampling.structured_output import GuidedRows, forbid_by_torch, forbid_masked
from nanovllm.engine.scheduling.sequence import Sequence
from nanovllm.engine.scheduling.token_counts import TokenCounts
from nanovllm.sampling_params import SamplingParams

VOCAB = 12


def make_sequence(*, stop_token_ids: frozenset[int] = frozenset(), **options: Any) -> Sequence:
    return Sequence("", [0], 1, SamplingParams(**options), 16, stop_token_ids=stop_token_ids)


def make_sampler(seed: int = 0) -> Sampler:
    return Sampler(torch.device("cpu"), seed)


def make_logits(rows: int = 1, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def draw(logits: Tensor, count: int = 4000, **options: Any) -> Counter[int]:
    sequences = [make_sequence(**options) for _ in range(count)]
    return Counter(make_sampler().sample(logits.expand(count, -1).clone(), sequences).tolist())


def test_greedy_rows_take_the_argmax_beside_random_ones() -> None:
    logits = make_logits(64)
    sequences = [make_sequence(temperature=0.0 if row % 2 else 5.0) for row in range(64)]
    tokens = make_sampler().sample(logits.clone(), sequences).tolist()
    assert tokens[1::2] == logits.argmax(-1).tolist()[1::2]
    assert tokens[::2] != logits.argmax(-1).tolist()[::2]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_random_rows_follow_the_distribution(temperature: float) -> None:
    logits = make_logits()
    counts = draw(logits, 20_000, temperature=temperature)
    expected = (logits[0] / temperature).softmax(-1)
    observed = torch.tensor([counts[token] / 20_000 for token in range(VOCAB)])
    assert float((observed - expected).abs().max()) < 0.015


def by_hand(logits: Tensor, output: list[int], options: dict[str, Any]) -> Tensor:
    """The distribution [VOCAB] that the parameters describe, one after the other, in float64."""
    logits = logits[0].double()
    for token in {0, *output}:
        penalty = options.get("repetition_penalty", 1.0)
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in output:
        logits[token] -= options.get("frequency_penalty", 0.0) + options.get("presence_penalty", 0.0) / output.count(
            token
        )
    for token, bias in options.get("logit_bias", {}).items():
        logits[token] += bias
    probabilities = (logits / options.get("temperature", 1.0)).softmax(0)
    probabilities[probabilities < options.get("min_p", 0.0) * probabilities.max()] = 0.0
    kept, mass = probabilities.argsort(descending=True).tolist(), 0.0
    kept = kept[: options.get("top_k") or VOCAB]
    total = float(probabilities[kept].sum())
    chosen = torch.zeros(VOCAB, dtype=torch.double)
    for token in kept:
        if mass < options.get("top_p", 1.0) * total:
            chosen[token] = probabilities[token]
            mass += float(probabilities[token])
    return chosen / chosen.sum()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 5},
        {"temperature": 2.0, "top_p": 0.8},
        {"temperature": 1.3, "min_p": 0.1},
        {"temperature": 2.0, "top_k": 8, "top_p": 0.9, "min_p": 0.05},
        {"logit_bias": {3: 2.0, 4: -2.0}},
        {"repetition_penalty": 1.5, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    ],
    ids=lambda options: "+".join(options),
)
def test_draws_follow_the_distribution_that_is_computed_by_hand(options: dict[str, Any]) -> None:
    logits, count, output = make_logits(seed=3), 20_000, [5, 5, 7, 9]
    sequences = [make_sequence(**options) for _ in range(count)]
    for sequence in sequences:
        sequence.token_ids += output
    counts = Counter(make_sampler().sample(logits.expand(count, -1).clone(), sequences).tolist())
    expected = by_hand(logits, output, options) * count

    assert set(counts) <= set(expected.nonzero().flatten().tolist())
    chi_squared = sum((counts[n] - float(e)) ** 2 / float(e) for n, e in enumerate(expected) if e)
    assert chi_squared < 35.0  # one in a thousand passes 31 with 11 degrees of freedom; the seed is fixed


def test_the_places_of_a_seeded_output_are_drawn_independently() -> None:
    logits, count = make_logits(seed=3), 4000
    sequence, sampler = make_sequence(seed=7), make_sampler()
    for _ in range(count):
        sequence.token_ids += sampler.sample(logits.clone(), [sequence]).tolist()
    counts = Counter(sequence.output_token_ids)
    expected = by_hand(logits, [], {}) * count
    assert sum((counts[n] - float(e)) ** 2 / float(e) for n, e in enumerate(expected)) < 35.0


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-60])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "min_p": 0.1}])
def test_the_coldest_temperatures_take_the_best_token(temperature: float, options: dict[str, Any]) -> None:
    logits = make_logits(seed=3) + 100.0
    assert int(logits.argmax()) != 0
    assert set(draw(logits, count=50, temperature=temperature, **options)) == {int(logits.argmax())}


@pytest.mark.parametrize("top_k", [1, 3, 7])
def test_top_k_keeps_the_k_best(top_k: int) -> None:
    logits = make_logits()
    assert set(draw(logits, top_k=top_k, temperature=4.0)) == set(logits[0].topk(top_k).indices.tolist())


@pytest.mark.parametrize("off", [0, -1, 1000])
def test_top_k_off_keeps_everything(off: int) -> None:
    assert len(draw(make_logits(), top_k=off, temperature=8.0)) == VOCAB


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.8])
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float) -> None:
    logits = make_logits()
    probabilities, order = logits[0].softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = {int(token) for token, mass in zip(order, before, strict=True) if mass < top_p}
    assert set(draw(logits, top_p=top_p, count=8000)) == kept


def test_min_p_drops_what_is_far_below_the_best() -> None:
    logits = make_logits()
    probabilities = logits[0].softmax(-1)
    kept = {token for token in range(VOCAB) if probabilities[token] >= 0.2 * probabilities.max()}
    assert set(draw(logits, min_p=0.2)) == kept


def test_filters_of_one_row_do_not_touch_another() -> None:
    logits = make_logits()
    sequences = [make_sequence(top_k=1), *[make_sequence(temperature=8.0) for _ in range(500)]]
    tokens = make_sampler().sample(logits.expand(501, -1).clone(), sequences).tolist()
    assert tokens[0] == int(logits.argmax())
    assert len(set(tokens[1:])) == VOCAB


def test_a_seed_reproduces_in_any_batch_and_at_any_row() -> None:
    steps = [make_logits(seed=step) for step in range(20)]

    def choices(neighbours_before: int, neighbours_after: int, engine_seed: int) -> list[int]:
        sampler = make_sampler(engine_seed)
        mine = make_sequence(seed=123)
        batch = [make_sequence() for _ in range(neighbours_before)] + [mine]
        batch += [make_sequence(seed=n) for n in range(neighbours_after)]
        return [sampler.sample(step.repeat(len(batch), 1), batch).tolist()[neighbours_before] for step in steps]

    alone = choices(0, 0, 0)
    assert alone == choices(3, 5, 1) == choices(7, 0, 2)
    assert alone != [make_sampler(5).sample(step.clone(), [make_sequence(seed=124)]).tolist()[0] for step in steps]


def test_end_tokens_are_impossible_before_min_tokens() -> None:
    logits = make_logits()
    best, second = logits[0].topk(2).indices.tolist()
    sequence = make_sequence(temperature=0.0, min_tokens=1, stop_token_ids=frozenset({best}))
    sampler = make_sampler()
    assert sampler.sample(logits.clone(), [sequence]).tolist() == [second]
    sequence.token_ids.append(second)
    assert sampler.sample(logits.clone(), [sequence]).tolist() == [best]


def test_the_random_bits_are_those_that_the_authors_of_philox_published() -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    assert [int(word) for word in philox(zero, zero, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


NEEDS_KERNELS = pytest.mark.skipif(kernels.missing() is not None, reason=f"no CPU kernels: {kernels.missing()}")


@NEEDS_KERNELS
@settings(max_examples=300, deadline=None)
@given(
    vocab=st.sampled_from([1, 5, 63, 64, 65, 1000, 5000]),
    spread=st.sampled_from([0.0, 0.5, 4.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    temperature=st.sampled_from([1e-5, 0.7, 1.0, 4.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    top_p=st.sampled_from([1e-9, 0.5, 0.9, 0.999, 2.0]),
    top_k=st.sampled_from([1, 2, 20, 900, 1500, 10_000]),
    forbidden=st.sampled_from([0.0, 0.5, 0.99]),
    seed=st.integers(0, 2**63 - 1),
)
def test_the_kernel_draws_the_tokens_that_torch_draws(
    vocab: int,
    spread: float,
    dtype: torch.dtype,
    temperature: float,
    min_p: float,
    top_p: float,
    top_k: int,
    forbidden: float,
    seed: int,
) -> None:
    numbers = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(3, vocab, generator=numbers)).to(dtype)  # rounded: with ties
    logits[torch.rand(3, vocab, generator=numbers) < forbidden] = float("-inf")
    logits[:, seed % vocab] = 0.25
    limits = torch.tensor([[1 / temperature, min_p, top_p]] * 3)
    keys = torch.tensor([[seed, row, min(top_k, vocab)] for row in range(3)])
    found = draw_tokens(logits, RandomRows(torch.arange(3), limits, keys))
    assert bool((logits.gather(1, found.unsqueeze(1)) > float("-inf")).all())
    wanted = draw_by_torch(logits, limits, keys)
    # Sums in another order may move the last token of top_p, which is drawn seldom.
    assert (found != wanted).sum() <= (top_p < 1.0)


@NEEDS_KERNELS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.1}])
def test_rows_without_a_finite_best_logit_still_give_a_token(bad: float, options: dict[str, Any]) -> None:
    logits = torch.full((1, 200), bad)
    assert 0 <= make_sampler().sample(logits, [make_sequence(**options)])[0] < 200


@pytest.mark.parametrize("forbid", [forbid_masked, forbid_by_torch])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [31, 32, 100])
def test_masks_forbid_the_tokens_whose_bits_are_0_in_guided_rows_alone(
    vocab: int, dtype: torch.dtype, forbid: Callable[[Tensor, GuidedRows], None]
) -> None:
    numbers = torch.Generator().manual_seed(vocab)
    masks = torch.randint(-(2**31), 2**31 - 1, (4, -(-vocab // 32)), generator=numbers).int()
    masks[1], masks[2] = -1, 0
    guided = GuidedRows(torch.tensor([5, 0, 2, 4]), masks)
    logits = torch.randn(6, vocab, generator=numbers).to(dtype)
    before = logits.clone()
    forbid(logits, guided)
    for row, mask in zip(guided.rows.tolist(), masks, strict=True):
        for token in range(vocab):
            is_allowed = int(mask[token // 32]) >> (token % 32) & 1
            assert logits[row, token] == (before[row, token] if is_allowed else float("-inf"))
    assert torch.equal(logits[1::2][:2], before[1::2][:2])


def test_forbidden_tokens_of_one_row_are_kept_where_they_are_all_that_a_row_has() -> None:
    logits = torch.full((3, VOCAB), float("-inf"))
    logits[:, 4], logits[1, 7] = 1.0, 0.5
    sequences = [make_sequence(temperature=0.0, min_tokens=1, stop_token_ids=frozenset({4})) for _ in range(3)]
    sequences[2] = make_sequence(temperature=0.0)
    assert make_sampler().sample(logits, sequences).tolist() == [4, 7, 4]
    assert torch.equal(logits[1].isfinite().nonzero().flatten(), torch.tensor([7]))


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    steps=st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=6),
    drafts=st.lists(st.integers(0, 9), max_size=3),
)
def test_token_counts_are_those_of_the_whole_sequence_after_every_step(
    prompt: list[int], steps: list[list[int]], drafts: list[int]
) -> None:
    sequence = Sequence("", list(prompt), len(prompt), SamplingParams(), 64)
    for step in steps:
        sequence.token_ids += step
        for one in (sequence, sequence.ahead(tuple(drafts))):
            output = Counter(one.output_token_ids)
            tokens, counts = one.count_tokens().arrays()
            found = dict(zip(tokens.tolist(), counts.tolist(), strict=True))
            assert found == {token: output[token] for token in one.token_ids}
    assert TokenCounts().arrays()[0].size == 0
