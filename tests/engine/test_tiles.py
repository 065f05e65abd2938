"""Linear layers by AMX tiles: the machine code that a CPU with AMX runs, on the emulator where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_parts import RecordingSampler, drain, greedy, random_prompt, recording_engine
from torch import Tensor

from nanovllm.engine.layers import linear
from nanovllm.engine.layers.linear import has_panels, make_panels, to_panels
from nanovllm.engine.layers.product_choice import Choice
from tests import amx

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(amx.missing() is not None, reason=str(amx.missing()))
ROWS = (1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 100)


@pytest.fixture(autouse=True)
def emulator() -> Iterator[amx.Emulator]:
    for dtype in (torch.bfloat16, torch.int8):
        if not has_panels(dtype, CPU):
            pytest.skip(f"no panels of {dtype} here")
    with amx.emulated() as emulator:
        yield emulator
        assert emulator.configured_threads() == 0


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def product(x: Tensor, panels: Tensor, width: int, *per_output: Tensor | None, **choice: int) -> Tensor:
    return torch.ops.nanovllm.multiply_panels(x, panels, width, *(per_output or (None, None, None)), **choice)


def bits(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def has_run(emulator: amx.Emulator, kind: str, before: int) -> bool:
    return emulator.executed()[kind] > before or not torch.ops.nanovllm.request_tiles()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "inputs"), [(1, 64), (100, 61), (145, 640)])
def test_tiles_of_bytes_have_the_bits_of_vectors(
    width: int, inputs: int, stored: torch.dtype, threads: int, emulator: amx.Emulator
) -> None:
    generator = torch.Generator().manual_seed(width)
    weight = torch.randint(-127, 128, (width, inputs), generator=generator).to(torch.int8)
    panels = to_panels(weight)
    wide = len(panels) * 48
    scales, bias = torch.rand(wide, generator=generator), torch.randn(wide, generator=generator)
    excess = torch.zeros(wide, dtype=torch.int32)
    excess[:width] = 128 * weight.sum(1, dtype=torch.int32)
    before = emulator.executed()["bytes"]
    for rows in ROWS:
        x = torch.randn(rows, inputs, generator=generator).to(stored)
        for added in (bias, None):
            found = product(x, panels, width, added, scales, excess, tiles_from=1)
            assert bits(found) == bits(product(x, panels, width, added, scales, excess))
    assert has_run(emulator, "bytes", before)


@pytest.mark.parametrize(("width", "inputs"), [(1, 32), (100, 96), (145, 1344)])
def test_a_row_of_bfloat16_by_tiles_is_right_and_the_same_in_any_batch(
    width: int, inputs: int, threads: int, emulator: amx.Emulator
) -> None:
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(width, inputs, generator=generator).bfloat16()
    x = torch.randn(max(ROWS), inputs, generator=generator).bfloat16()
    panels = to_panels(weight)
    bias = torch.randn(len(panels) * 48, generator=generator)
    before = emulator.executed()["bfloat16"]
    together = product(x, panels, width, bias, None, None, tiles_from=1)
    expected = x.double() @ weight.double().T + bias[:width].double()
    # What float32 sums lose is far below the result's own rounding, to 8 bits.
    torch.testing.assert_close(together.double(), expected, rtol=2**-8, atol=1e-5 * inputs**0.5)
    for rows in ROWS:
        assert bits(product(x[:rows], panels, width, bias, None, None, tiles_from=1)) == bits(together[:rows])
        assert bits(product(x[-rows:], panels, width, bias, None, None, tiles_from=1)) == bits(together[-rows:])
    assert has_run(emulator, "bfloat16", before)


def test_sums_by_tiles_are_nearer_to_the_truth_than_those_of_vectors(emulator: amx.Emulator) -> None:
    """A row's sums are read in pieces of 8 bits, as results are bfloat16: each has the earlier ones as its bias."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(48, 1024, generator=generator).bfloat16()
    x = torch.randn(16, 1024, generator=generator).bfloat16()
    exact = x.double() @ weight.double().T
    panels = to_panels(weight)

    def error(**choice: int) -> float:
        found = torch.zeros(48)
        for _ in range(3):
            found += product(x, panels, 48, -found, None, None, **choice)[0].float()
        return float((found.double() - exact[0]).norm() / exact[0].norm())

    assert error(tiles_from=1) < error() < 1e-6


@pytest.mark.parametrize("inputs", [2, 34, 62, 66])
def test_inputs_that_fill_no_whole_tiles_are_multiplied_by_vectors(inputs: int, emulator: amx.Emulator) -> None:
    weight, x = torch.randn(50, inputs).bfloat16(), torch.randn(20, inputs).bfloat16()
    before = emulator.executed()
    found = product(x, to_panels(weight), 50, tiles_from=1)
    assert emulator.executed() == before
    assert bits(found) == bits(product(x, to_panels(weight), 50))


def test_fewer_rows_than_the_limit_are_multiplied_by_vectors(emulator: amx.Emulator) -> None:
    weight, x = torch.randn(50, 64).bfloat16(), torch.randn(20, 64).bfloat16()
    before = emulator.executed()
    assert bits(product(x, to_panels(weight), 50, tiles_from=21)) == bits(product(x, to_panels(weight), 50))
    assert emulator.executed() == before
    product(x, to_panels(weight), 50, tiles_from=20)
    assert has_run(emulator, "bfloat16", before["bfloat16"])


@pytest.mark.parametrize("rows", [1, 8, 9, 10, 45, 46, 100])
@pytest.mark.parametrize(("width", "inputs"), [(1, 2), (47, 34), (200, 258)])
def test_panels_of_bfloat16_as_floats_have_the_bits_of_their_own_instruction(
    width: int, inputs: int, rows: int, threads: int
) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(width, inputs, generator=generator).bfloat16()
    x = torch.randn(rows, inputs, generator=generator).bfloat16()
    weight[0, 0], x[-1, -1] = 1e-39, 1e-39  # denormal numbers count as zero
    x[0] *= 2.0**-70
    weight[-1] *= 2.0**-70  # and so do products below the normal numbers
    weight[width // 2, 1] = float("inf")
    panels, bias = to_panels(weight), torch.full((len(to_panels(weight)) * 48,), 1e-39)
    for added in (None, bias):
        found = product(x, panels, width, added, None, None, floats_from=1)
        assert bits(found) == bits(product(x, panels, width, added, None, None))


def test_no_rows_have_no_products() -> None:
    weight = torch.randn(50, 64).bfloat16()
    assert make_panels(weight, None).product()(torch.empty(0, 64).bfloat16()).shape == (0, 50)
    assert product(torch.empty(0, 64).bfloat16(), to_panels(weight), 50, tiles_from=0).shape == (0, 50)


@pytest.mark.parametrize("deterministic", [True, False])
def test_layers_of_a_tower_multiply_by_tiles_and_keep_a_row_s_bits_where_that_is_promised(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_MIN_PACKED_ELEMENTS", 0)
    torch.manual_seed(1)
    tower = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 50)).bfloat16()
    x = torch.randn(1, 20, 64).bfloat16()
    with torch.inference_mode(), amx.granted(monkeypatch, Choice(tiles_from=2)) as emulator:
        expected = tower(x)
        linear.choose_torch_layouts(tower, deterministic=deterministic)
        before = emulator.executed()["bfloat16"]
        together = tower(x)
        assert has_run(emulator, "bfloat16", before)
        torch.testing.assert_close(together, expected, rtol=2e-2, atol=2e-2)
        before = emulator.executed()
        alone = tower(x[:, 7:8])
        if deterministic:
            assert bits(alone) == bits(together[:, 7:8])
        else:
            assert emulator.executed() == before


def logits_of(directory: Path, **options: Any) -> Tensor:
    """Logits [tokens, vocab] of eight requests, each computed among the others."""
    engine = recording_engine(directory, **options)
    for seed in range(8):
        engine.add_request(random_prompt(seed, 5 + 4 * seed), greedy(4), request_id=str(seed))
    drain(engine)
    assert isinstance(engine.sampler, RecordingSampler)
    rows = engine.sampler.logits
    return torch.stack([rows[str(seed)][place] for seed in range(8) for place in sorted(rows[str(seed)])])


def test_an_engine_answers_in_int8_with_the_same_bits_by_tiles(
    text: Path, monkeypatch: pytest.MonkeyPatch, emulator: amx.Emulator
) -> None:
    monkeypatch.setattr(linear, "_MIN_PACKED_ELEMENTS", 0)
    expected = logits_of(text, quantization="int8")
    before = emulator.executed()["bytes"]
    with amx.granted(monkeypatch, Choice(tiles_from=3)):
        assert bits(logits_of(text, quantization="int8")) == bits(expected)
    assert has_run(emulator, "bytes", before)


def test_an_engine_in_bfloat16_is_as_near_to_float32_by_tiles(
    text: Path, monkeypatch: pytest.MonkeyPatch, emulator: amx.Emulator
) -> None:
    monkeypatch.setattr(linear, "_MIN_PACKED_ELEMENTS", 0)
    exact, by_vectors = logits_of(text)[::4], logits_of(text, dtype="bfloat16")[::4].float()
    before = emulator.executed()["bfloat16"]
    with amx.granted(monkeypatch, Choice(tiles_from=1)):
        by_tiles = logits_of(text, dtype="bfloat16")[::4].float()  # of first tokens: prompts are the same
    assert has_run(emulator, "bfloat16", before)
    assert 0 < (by_tiles - exact).abs().mean() <= 1.2 * (by_vectors - exact).abs().mean()


def test_a_shape_that_a_cpu_refuses_ends_the_process(emulator: amx.Emulator, capfd: pytest.CaptureFixture[str]) -> None:
    """The emulator does not forgive what the CPU would not: here three bytes of a row."""
    if not torch.ops.nanovllm.request_tiles():
        pytest.skip("the CPU has tiles itself")
    child = os.fork()
    if child == 0:
        emulator.library.amx_multiply(0, 1, 3, 1, b" " * 64, b" " * 64, b" " * 64)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 132
    assert "a CPU refuses this instruction" in capfd.readouterr().err
