"""Linear layers in every form that a weight is stored in."""

from __future__ import annotations

import weakref

import pytest
import torch

from nanovllm.engine import kernels
from nanovllm.engine.layers import linear
from nanovllm.engine.layers.linear import (
    Linear,
    Panels,
    choose_torch_layouts,
    has_panels,
    int8_product,
    make_panels,
    shortest,
    to_panels,
)
from nanovllm.engine.layers.panel_forms import is_emulated, panel_product


def make_layer(in_features: int, out_features: int, *, bias: bool = False, seed: int = 0) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    layer = Linear(in_features, out_features, bias=bias)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 16, 33])
def test_packed_weights_multiply_as_plain_ones(bias: bool, num_rows: int) -> None:
    layer = make_layer(512, 768, bias=bias)
    with torch.inference_mode():
        x = torch.randn(num_rows, 512)
        expected = layer(x)
        layer.choose_layout()
        assert layer.weight.numel() == 0
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-3)


def test_a_packed_bfloat16_weight_multiplies_as_a_plain_one() -> None:
    layer = make_layer(512, 768).to(torch.bfloat16)
    x = torch.randn(9, 512, dtype=torch.bfloat16)
    expected = layer(x)
    layer.choose_layout()
    torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=0.3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_keeps_two_digits_of_every_row_however_rows_differ_in_size(bias: bool, dtype: torch.dtype) -> None:
    layer = make_layer(512, 384, bias=bias).to(dtype)
    x = torch.randn(5, 512, dtype=dtype) * torch.tensor([1e-3, 1.0, 30.0, 1e4, 0.0], dtype=dtype).view(-1, 1)
    expected = layer(x).float()
    layer.choose_layout("int8")
    assert layer.weight.numel() == 0
    output = layer(x)
    assert output.dtype == dtype
    error = (output.float() - expected).norm(dim=-1)
    assert (error <= 0.03 * expected.norm(dim=-1)).all()
    torch.testing.assert_close(output[4].float(), expected[4], rtol=1e-2, atol=1e-3)


def test_an_int8_row_is_the_same_to_the_bit_in_any_batch() -> None:
    layer = make_layer(256, 320)
    layer.choose_layout("int8")
    x = torch.randn(70, 256) * torch.rand(70, 1).exp()
    together = layer(x)
    for size in (1, 2, 3, 17, 64):
        assert torch.equal(torch.cat([layer(part) for part in x.split(size)]), together)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_of_somebody_else_s_module_are_packed_where_that_pays(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(3)
    module = torch.nn.Sequential(torch.nn.Linear(512, 512, bias=bias), torch.nn.Linear(512, 8)).to(dtype).eval()
    x = torch.randn(2, 7, 512, dtype=dtype)
    with torch.inference_mode():
        expected = module(x)
        choose_torch_layouts(module)
        assert [layer.weight.numel() for layer in module] == [0, 0 if is_emulated(dtype) else 8 * 512]
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(module(x), expected, rtol=tolerance, atol=tolerance)


CPU = torch.device("cpu")


def needs_panels(dtype: torch.dtype) -> None:
    if not has_panels(dtype, CPU):
        pytest.skip(f"no panels of {dtype} here: {kernels.missing() or 'the CPU lacks what they need'}")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 2), (3, 5), (47, 34), (48, 64), (200, 258), (130, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_multiply_as_the_plain_weight_and_each_row_by_itself(
    dtype: torch.dtype, outputs: int, inputs: int, bias: bool
) -> None:
    needs_panels(dtype)
    torch.manual_seed(outputs)
    weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(37, inputs).to(dtype)
    added = torch.randn(outputs).to(dtype) if bias else None
    multiply = make_panels(weight, added).product()
    product = multiply(x)
    expected = x.double() @ weight.double().T + (added.double() if added is not None else 0)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(product.double(), expected, rtol=tolerance, atol=tolerance * inputs**0.5)
    for size in (1, 3, 9, 10, 16):
        assert torch.equal(torch.cat([multiply(rows) for rows in x.split(size)]), product)
    assert torch.equal(multiply(x.view(1, 37, inputs)), product.view(1, 37, outputs))
    assert multiply(x[:0]).shape == (0, outputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(3, 5), (48, 64), (130, 258)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_panels_of_bytes_are_the_rounded_products_exactly(
    dtype: torch.dtype, outputs: int, inputs: int, bias: bool
) -> None:
    needs_panels(torch.int8)
    torch.manual_seed(outputs)
    weight, x = torch.randn(outputs, inputs), torch.randn(21, inputs).to(dtype)
    added = torch.randn(outputs) if bias else None
    panels = int8_product(weight, added)
    assert isinstance(panels, Panels)
    product = panels.product()(x)

    def rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales = rows.abs().amax(1, keepdim=True)
        return (rows / scales * 127).round().double(), scales.double() / 127

    (inputs_, input_scales), (weights, weight_scales) = rounded(x.float()), rounded(weight)
    expected = inputs_ @ weights.T * input_scales * weight_scales.T + (added.double() if added is not None else 0)
    torch.testing.assert_close(product.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-2)


@pytest.mark.skipif(not has_panels(torch.float32, torch.device("cpu")), reason="no panels in float32 here")
def test_panels_of_a_small_layer_give_the_same_bits_by_any_number_of_threads() -> None:
    layer, before = make_layer(1536, 160), torch.get_num_threads()  # torch's own product differs between 1 and 2
    layer.choose_layout(tile=16)
    x = torch.randn(33, 1536)
    products = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                products.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(product, products[0]) for product in products)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_libraries_multiply_where_our_kernel_is_missing(
    quantization: linear.Quantization | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer(512, 768, bias=True)
    x = torch.randn(9, 512)
    expected = layer(x)
    monkeypatch.setattr(linear, "has_panels", lambda *_: False)
    layer.choose_layout(quantization)
    assert layer.layout == (quantization or "packed")
    tolerance = 1e-3 if quantization is None else 3.0  # of outputs whose spread is 23
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=tolerance)


def test_a_packed_layer_does_not_keep_its_plain_weight() -> None:
    layer = make_layer(512, 768)
    address = weakref.ref(layer.weight)
    layer.choose_layout()
    assert address() is None


@pytest.mark.skipif(not has_panels(torch.float32, torch.device("cpu")), reason="no kernels")
@pytest.mark.parametrize("num_rows", [1, 8, 9, 10, 45, 46, 100])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 5), (47, 33), (200, 258)])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_panels_of_16_bits_multiply_to_the_bits_of_float32_ones(
    stored: torch.dtype, outputs: int, inputs: int, num_rows: int
) -> None:
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(outputs, inputs, generator=generator).to(stored)
    weight[0, 0] = 1e-7 if stored == torch.float16 else 1e-40  # below the normal numbers of its type
    weight[-1, -1] = float("inf")
    weight, x = weight.float(), torch.randn(num_rows, inputs, generator=generator)
    has_pairs = stored == torch.float16 or inputs % 2 == 0
    assert shortest(weight).dtype == (stored if has_pairs else torch.float32)
    panels = to_panels(weight)
    expected = panel_product(panels, outputs, (None, None, None))(x)
    found = make_panels(weight, None).product()(x)
    assert found.numpy().tobytes() == expected.numpy().tobytes()


def test_a_weight_with_a_value_that_16_bits_have_not_stays_in_float32() -> None:
    weight = torch.zeros(2, 4)
    weight[1, 2] = 1 + 2**-20
    assert shortest(weight) is weight
    weight[1, 2] = float("nan")
    assert shortest(weight) is weight
    assert shortest(torch.zeros(2, 3, dtype=torch.float16)).dtype == torch.float16
