"""float32 as three bfloat16 products on AMX tiles, emulated where the CPU has none, beside vectors of float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nanovllm.engine.kernels import tiles
from nanovllm.engine.layers import linear, product_choice
from nanovllm.engine.layers.linear import has_panels, make_panels, shortest, to_panels
from nanovllm.engine.layers.product_choice import Choice
from tests import amx

ROWS = (1, 2, 15, 16, 17, 33)
INFINITY, LARGEST = float("inf"), torch.finfo(torch.float32).max


@pytest.fixture(autouse=True)
def emulator() -> Iterator[amx.Emulator]:
    if amx.missing() is not None or not has_panels(torch.float32, torch.device("cpu")):
        pytest.skip(amx.missing() or "no panels here")
    with amx.emulated() as emulator:
        yield emulator
        assert emulator.configured_threads() == 0


def products(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """By tiles, and by vectors of float32: x times a weight that is exactly bfloat16."""
    panels = to_panels(shortest(weight))
    assert panels.dtype == torch.bfloat16
    none = (None, None, None)
    by_tiles = product_choice.multiply(x, panels, len(weight), none, Choice(tiles_from=1))
    return by_tiles, product_choice.multiply(x, panels, len(weight), none)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_three_parts_have_all_bits_of_an_input(emulator: amx.Emulator) -> None:
    x = drawn(20, 64)
    before = emulator.executed()["bfloat16"]
    by_tiles, _ = products(x, torch.eye(64))
    assert torch.equal(by_tiles, x)
    assert emulator.executed()["bfloat16"] > before or tiles.why_not() is None


@pytest.mark.parametrize("inputs", [64, 576, 1536])
@pytest.mark.parametrize("kind", ["uniform", "normal", "outliers", "wide exponents"])
def test_three_products_are_no_less_exact_than_vectors_of_float32(kind: str, inputs: int) -> None:
    x, weight = drawn(16, inputs), drawn(48, inputs, seed=1).bfloat16().float()
    if kind == "uniform":
        x = torch.rand(x.shape, generator=torch.Generator().manual_seed(2))
    elif kind == "outliers":
        x[:, ::97] *= 300
    elif kind == "wide exponents":
        x *= 2.0 ** drawn(*x.shape, seed=3).mul(8).round()
    exact = x.double() @ weight.double().T
    by_tiles, by_vectors = ((found.double() - exact).norm() / exact.norm() for found in products(x, weight))
    assert by_tiles <= by_vectors


def test_a_row_of_three_products_is_the_same_in_any_batch() -> None:
    x, weight = drawn(max(ROWS), 128), drawn(100, 128, seed=1).bfloat16().float()
    together, _ = products(x, weight)
    for rows in ROWS:
        assert torch.equal(products(x[:rows].contiguous(), weight)[0], together[:rows])
        assert torch.equal(products(x[-rows:].contiguous(), weight)[0], together[-rows:])


@pytest.mark.parametrize("odd", [INFINITY, -INFINITY, float("nan"), LARGEST, -LARGEST])
def test_what_is_no_number_gives_what_it_gives_in_float32(odd: float) -> None:
    x, weight = drawn(17, 64), drawn(48, 64, seed=1).bfloat16().float()
    weight[0, 5], weight[1, 5] = 0.0, 2.0
    x[3, 5] = odd
    by_tiles, by_vectors = products(x, weight)
    torch.testing.assert_close(by_tiles, by_vectors, rtol=1e-5, atol=1e-4, equal_nan=True)


def test_a_nan_whose_payload_lies_in_the_lower_bits_stays_one() -> None:
    x = torch.ones(1, 32)
    x.view(torch.int32)[0, 7] = 0x7F800001
    assert products(x, torch.ones(48, 32))[0].isnan().all()


def test_denormal_numbers_count_as_zero_and_small_inputs_lose_no_more() -> None:
    weight = torch.eye(32)
    x = torch.zeros(3, 32)
    x[0], x[1], x[2] = 1e-40, 2.0**-110 * 1.2345678, 2.0**-101 * 1.2345678
    by_tiles, by_vectors = products(x, weight)
    assert torch.equal(by_vectors, x)
    assert torch.equal(by_tiles[0], torch.zeros(32))
    assert 0 < (by_tiles[1] - x[1]).abs().max() < 2.0**-125
    assert torch.equal(by_tiles[2], x[2])


def test_only_finite_weights_of_bfloat16_have_three_products(
    emulator: amx.Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear.product_choice, "choose", lambda *_, **__: Choice(tiles_from=1))
    x, weight = drawn(4, 64), drawn(48, 64, seed=1).bfloat16().float()
    infinite, halves, whole = weight.clone(), drawn(48, 64, seed=2).half().float(), drawn(48, 64, seed=3)
    infinite[7, 9] = INFINITY
    for other in (infinite, halves, whole):
        before = emulator.executed()["bfloat16"]
        found = make_panels(other, None).product()(x)
        assert emulator.executed()["bfloat16"] == before
        torch.testing.assert_close(found, x @ other.T, equal_nan=True)
    assert torch.equal(make_panels(weight, None).product()(x), products(x, weight)[0])


def test_float32_is_multiplied_by_vectors_in_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    with amx.granted(monkeypatch, Choice(tiles_from=9)):
        assert product_choice.choose(torch.float32) == Choice(tiles_from=9)
        assert product_choice.choose(torch.float32, deterministic=True) == Choice()


def test_the_measured_choice_has_tiles_for_float32() -> None:
    found = product_choice.measure(torch.float32, can_have_tiles=False)
    assert set(found) == {"vectors"}
    if tiles.why_not() is None:
        assert set(product_choice.measure(torch.float32, can_have_tiles=True)) == {"vectors", "tiles"}
