"""Linear layers in every form that a weight is stored in."""

from __future__ import annotations

import pytest
import torch

from nanovllm.engine.linear import Linear, pack_linears


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
        layer.pack()
        assert layer.weight.numel() == 0
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-3)


def test_a_packed_bfloat16_weight_multiplies_as_a_plain_one() -> None:
    layer = make_layer(512, 768).to(torch.bfloat16)
    x = torch.randn(9, 512, dtype=torch.bfloat16)
    expected = layer(x)
    layer.pack()
    torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=0.3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_keeps_two_digits_of_every_row_however_rows_differ_in_size(bias: bool, dtype: torch.dtype) -> None:
    layer = make_layer(512, 384, bias=bias).to(dtype)
    x = torch.randn(5, 512, dtype=dtype) * torch.tensor([1e-3, 1.0, 30.0, 1e4, 0.0], dtype=dtype).view(-1, 1)
    expected = layer(x).float()
    layer.pack("int8")
    assert layer.weight.numel() == 0
    output = layer(x)
    assert output.dtype == dtype
    error = (output.float() - expected).norm(dim=-1)
    assert (error <= 0.03 * expected.norm(dim=-1)).all()
    torch.testing.assert_close(output[4].float(), expected[4], rtol=1e-2, atol=1e-3)


def test_an_int8_row_is_the_same_to_the_bit_in_any_batch() -> None:
    layer = make_layer(256, 320)
    layer.pack("int8")
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
        pack_linears(module)
        assert [layer.weight.numel() for layer in module] == [0, 8 * 512]
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(module(x), expected, rtol=tolerance, atol=tolerance)
