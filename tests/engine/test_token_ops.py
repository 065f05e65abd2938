"""What is done to each token by itself: our kernels against torch's operators, and the same bits in any batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nanovllm.engine import kernels
from nanovllm.engine.layers import token_ops as rows

WIDTH, HEADS, DIM = 96, 5, 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6

pytestmark = pytest.mark.skipif(kernels.missing() is not None, reason=str(kernels.missing()))


def operations(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions of rows [T, HEADS * DIM], each on as much of a row as it needs."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    weight, norm, positions = draw(WIDTH), draw(HEADS - 1, DIM), draw(200, 2, 1, DIM)

    def heads(norm: Tensor | None) -> Callable[[Tensor], Tensor]:
        def rotate(x: Tensor) -> Tensor:
            cos, sin = positions[x[:, 0].float().abs().mul(1000).long() % 200].unbind(1)
            return rows.rotate_heads(x.view(len(x), HEADS, DIM)[:, :-1], norm, EPS, (cos, sin))

        return rotate

    return {
        "rms_norm": lambda x: rows.add_rms_norm(x[:, :WIDTH].contiguous(), None, weight, EPS),
        "rotate_heads": heads(None),
        "rotate_normalised_heads": heads(norm),
        "gated_silu": lambda x: rows.gated_silu(x[:, : 2 * WIDTH].contiguous()),
        "scale_rows": lambda x: torch.cat(rows.scale_rows(x[:, :WIDTH].contiguous()), 1),
    }


NAMES = list(operations(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 7, 300])
def test_kernels_compute_what_torch_computes(
    name: str, dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = (torch.randn(count, HEADS * DIM) * torch.rand(count, 1).mul(4).exp()).to(dtype)
    ours = operations(dtype)[name](x)
    monkeypatch.setattr(kernels, "missing", lambda: "asked to do without")
    theirs = operations(dtype)[name](x)
    assert ours.dtype == theirs.dtype
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.float().abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_same_to_the_bit_in_any_batch(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(257, HEADS * DIM).to(dtype)
    operation = operations(dtype)[name]
    together = operation(x)
    for size in (1, 2, 5, 64):
        assert torch.equal(torch.cat([operation(part) for part in x.split(size)]), together)


def test_a_row_of_zeros_stays_one() -> None:
    scaled, largest = rows.scale_rows(torch.zeros(2, 64))
    assert not scaled.any()
    assert (largest > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 64, 1001])
def test_the_best_place_is_the_first_of_the_highest(width: int, dtype: torch.dtype) -> None:
    x = torch.randint(-5, 5, (40, width), generator=torch.Generator().manual_seed(width)).to(dtype)
    x[0] = float("-inf")
    expected = [row.index(max(row)) for row in x.tolist()]
    assert rows.argmax(x).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 300])
def test_a_sum_and_its_norm_in_one_pass_have_the_bits_of_both(dtype: torch.dtype, count: int) -> None:
    residual, update, weight = (torch.randn(n, WIDTH).to(dtype) for n in (count, count, 1))
    expected = residual + update
    normed = rows.add_rms_norm(expected.clone(), None, weight[0], EPS)
    assert torch.equal(rows.add_rms_norm(residual, update, weight[0], EPS), normed)
    assert torch.equal(residual, expected)
