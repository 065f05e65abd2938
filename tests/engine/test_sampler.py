"""Which token is taken, row by row, whoever the neighbours are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.engine.sampling.sampler import Sampler
from nanovllm.engine.scheduling.sequence import Sequence
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
    return Counter(make_sampler().sample(logits.expand(count, -1).clone(), sequences))


def test_greedy_rows_take_the_argmax_beside_random_ones() -> None:
    logits = make_logits(64)
    sequences = [make_sequence(temperature=0.0 if row % 2 else 5.0) for row in range(64)]
    tokens = make_sampler().sample(logits.clone(), sequences)
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
    counts = Counter(make_sampler().sample(logits.expand(count, -1).clone(), sequences))
    expected = by_hand(logits, output, options) * count

    assert set(counts) <= set(expected.nonzero().flatten().tolist())
    chi_squared = sum((counts[n] - float(e)) ** 2 / float(e) for n, e in enumerate(expected) if e)
    assert chi_squared < 35.0  # one in a thousand passes 31 with 11 degrees of freedom; the seed is fixed


def test_the_places_of_a_seeded_output_are_drawn_independently() -> None:
    logits, count = make_logits(seed=3), 4000
    sequence, sampler = make_sequence(seed=7), make_sampler()
    for _ in range(count):
        sequence.token_ids += sampler.sample(logits.clone(), [sequence])
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
    tokens = make_sampler().sample(logits.expand(501, -1).clone(), sequences)
    assert tokens[0] == int(logits.argmax())
    assert len(set(tokens[1:])) == VOCAB


def test_a_seed_reproduces_in_any_batch_and_at_any_row() -> None:
    steps = [make_logits(seed=step) for step in range(20)]

    def choices(neighbours_before: int, neighbours_after: int, engine_seed: int) -> list[int]:
        sampler = make_sampler(engine_seed)
        mine = make_sequence(seed=123)
        batch = [make_sequence() for _ in range(neighbours_before)] + [mine]
        batch += [make_sequence(seed=n) for n in range(neighbours_after)]
        return [sampler.sample(step.repeat(len(batch), 1), batch)[neighbours_before] for step in steps]

    alone = choices(0, 0, 0)
    assert alone == choices(3, 5, 1) == choices(7, 0, 2)
    assert alone != [make_sampler(5).sample(step.clone(), [make_sequence(seed=124)])[0] for step in steps]


def test_end_tokens_are_impossible_before_min_tokens() -> None:
    logits = make_logits()
    best, second = logits[0].topk(2).indices.tolist()
    sequence = make_sequence(temperature=0.0, min_tokens=1, stop_token_ids=frozenset({best}))
    sampler = make_sampler()
    assert sampler.sample(logits.clone(), [sequence]) == [second]
    sequence.token_ids.append(second)
    assert sampler.sample(logits.clone(), [sequence]) == [best]
