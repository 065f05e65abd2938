"""Registers, spills and shared memory of attention over packed sequences, compiled for GPUs that need not be here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import gcd

import pytest
import triton_compile
from triton_compile import CAPABILITIES, ELEMENTS, Launch, compile_for

if (reason := triton_compile.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from nanovllm.engine.kernels.paged_triton import choose_tile

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def launch(dtype: str, dim: int, capability: int) -> Launch:
    """A layer of a tower: heads of ``dim`` that lie in one tensor with the others'."""
    tile = choose_tile(1000, 1, dim, BYTES[dtype], divmod(capability, 10))
    strides = [f"stride_{name}_{of}" for name in ("query", "key", "value", "output") for of in ("token", "head")]
    types = dict.fromkeys(("query", "key", "value", "output"), ELEMENTS[dtype])
    types |= {"starts": "*i32", "scale": "fp32", **dict.fromkeys(("rows", *strides), "i32")}
    padded = max(16, 1 << (dim - 1).bit_length())
    constants = {
        "group": 1, "alignment": gcd(16, dim), "dim": dim, "padded_dim": padded,
        "queries": tile.queries, "keys": tile.keys,
    }  # fmt: skip
    aligned = strides if dim % 16 == 0 else [name for name in strides if name.endswith("token")]
    kernel = "nanovllm.engine.kernels.packed_triton:_packed_kernel"
    return Launch(kernel, types, constants, aligned, tile.num_warps, tile.num_stages)


def excess(wanted: Sequence[tuple[str, int, int]]) -> list[str]:
    """What is beyond the bounds, of heads of a dtype and size for a capability."""
    found = compile_for([(launch(*one), one[2]) for one in wanted])
    return [f"{one}: {beyond}" for one, taken in zip(wanted, found, strict=True) for beyond in taken.excess()]


@pytest.mark.slow
def test_tiles_of_usual_towers_fit_into_registers_and_shared_memory() -> None:
    widest = [("bfloat16", 72, capability) for capability in CAPABILITIES]  # Qwen3-VL's 1152 / 16
    assert not excess([*widest, ("bfloat16", 64, 90), ("bfloat16", 80, 90), ("float32", 80, 90)])


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_every_tile_fits_into_registers_and_shared_memory() -> None:
    assert not excess(list(product(ELEMENTS, (24, 64, 72, 80, 128, 256), CAPABILITIES)))
