"""The emulator of AMX tiles against their definition, computed with exact fractions."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

from tests import amx

pytestmark = pytest.mark.skipif(amx.missing() is not None, reason=str(amx.missing()))

_SMALLEST_NORMAL = Fraction(2) ** -126


@pytest.fixture(scope="module", autouse=True)
def emulator() -> Iterator[amx.Emulator]:
    with amx.emulated() as emulator:
        yield emulator


def multiply(kind: int, sums: np.ndarray, left: np.ndarray, right: np.ndarray, row_bytes: int, columns: int) -> None:
    amx._emulator().library.amx_multiply(
        *(kind, len(sums), row_bytes, columns),
        *(ctypes.c_void_p(array.ctypes.data) for array in (sums, left, right)),
    )


def rounded(value: Fraction) -> Fraction:
    """To the nearest float32, ties to even; what is below the normal numbers then is zero."""
    if value == 0:
        return value
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    unit = Fraction(2) ** (exponent - 23)
    value = round(value / unit) * unit
    return value if abs(value) >= _SMALLEST_NORMAL else Fraction(0)


def read(number: float) -> Fraction:
    """A number as tiles read it: denormals are zero."""
    value = Fraction(float(number))
    return value if abs(value) >= _SMALLEST_NORMAL else Fraction(0)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Cut off: any bits will do."""
    return (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize(("rows", "pairs", "columns"), [(16, 16, 16), (1, 16, 16), (5, 3, 2), (16, 1, 7)])
@pytest.mark.parametrize("spread", [1, 60], ids=["usual", "with underflow"])
def test_products_of_bfloat16_are_summed_even_and_odd_apart_with_denormals_as_zero(
    rows: int, pairs: int, columns: int, spread: int
) -> None:
    generator = np.random.default_rng(rows + spread)

    def draw(*shape: int) -> np.ndarray:
        return to_bfloat16(generator.normal(size=shape) * 2.0 ** -generator.integers(0, spread + 5, shape))

    left, right = draw(rows, 2 * pairs), draw(pairs, columns, 2)
    left[0, 0] = 1e-39  # below the normal numbers: read as zero, though its product with 2^100 would count
    right[0, 0, 0] = 2.0**100
    sums = (generator.normal(size=(rows, columns)) * 2.0 ** -(2 * spread + 4)).astype(np.float32)
    sums[-1, -1] = 1e-39
    expected = np.empty_like(sums)
    for m in range(rows):
        for n in range(columns):
            parts = [Fraction(0), Fraction(0)]
            for k in range(pairs):
                for odd in (0, 1):
                    product = read(left[m, 2 * k + odd]) * read(right[k, n, odd])
                    parts[odd] = rounded(parts[odd] + product)
            expected[m, n] = float(rounded(read(sums[m, n]) + rounded(parts[0] + parts[1])))
    halves = [(array.view(np.uint32) >> 16).astype(np.uint16) for array in (left, right)]
    multiply(0, sums, halves[0], halves[1], 4 * pairs, columns)
    np.testing.assert_array_equal(sums, expected)


@pytest.mark.parametrize(("rows", "fours", "columns"), [(16, 16, 16), (1, 16, 16), (7, 2, 5)])
@pytest.mark.parametrize("kind", [1, 2, 3, 4])
def test_products_of_bytes_are_exact_with_and_without_signs(kind: int, rows: int, fours: int, columns: int) -> None:
    generator = np.random.default_rng(kind)
    left, right = (
        generator.integers(-128 if signed else 0, 128 if signed else 256, shape)
        for signed, shape in ((kind in (3, 4), (rows, 4 * fours)), (kind in (2, 4), (fours, columns, 4)))
    )
    sums = generator.integers(-(2**31), 2**31, (rows, columns)).astype(np.int32)
    total = sums + left @ right.transpose(0, 2, 1).reshape(4 * fours, columns)
    expected = ((total + 2**31) % 2**32 - 2**31).astype(np.int32)  # they wrap
    multiply(kind, sums, left.astype(np.uint8), right.astype(np.uint8), 4 * fours, columns)
    np.testing.assert_array_equal(sums, expected)


def test_infinities_pass() -> None:
    left, right = np.ones((1, 2), np.float32), np.ones((1, 1, 2), np.float32)
    right[0, 0, 1] = np.inf
    sums = np.zeros((1, 1), np.float32)
    multiply(0, sums, *((array.view(np.uint32) >> 16).astype(np.uint16) for array in (left, right)), 4, 1)
    assert sums[0, 0] == np.inf


def test_no_thread_holds_tiles_after_a_product(emulator: amx.Emulator) -> None:
    assert emulator.configured_threads() == 0
