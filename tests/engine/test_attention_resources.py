"""Registers, spills and shared memory of our attention kernel, compiled for GPUs that need not be here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import pytest
import triton_compile
from triton_compile import CAPABILITIES, ELEMENTS, Compiled, Launch, compile_for

if (reason := triton_compile.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from nanovllm.engine.attention.selection import Heads
from nanovllm.engine.kernels.paged_triton import choose_tile

KERNELS = "nanovllm.engine.kernels.paged_triton"
STRIDES = ("query_token", "query_head", "output_token", "output_head", "page", "slot", "value", "kv_head")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Step:
    """What a tile of the table is chosen by."""

    dtype: str
    group: int
    dim: int
    longest: int  # row, in tokens

    def launch(self, capability: int) -> Launch:
        """Pages of 16; pointers and strides aligned as a model's."""
        tile = choose_tile(self.longest, self.group, self.dim, BYTES[self.dtype], divmod(capability, 10))
        types = dict.fromkeys(("query", "cache", "output"), ELEMENTS[self.dtype])
        types |= dict.fromkeys(("part_output", "part_max", "part_sum"), "*fp32")
        types |= dict.fromkeys(("starts", "contexts", "tables"), "*i32")
        strides = [f"stride_{name}" for name in STRIDES]
        types |= {"scale": "fp32", **dict.fromkeys(("rows", "stride_table", *strides), "i32")}
        constants = {
            "page_size": 16, "group": self.group, "dim": self.dim, "padded_dim": padded(self.dim),
            "lines": tile.queries, "keys": tile.keys,
        }  # fmt: skip
        return Launch(f"{KERNELS}:_attention_kernel", types, constants, strides, tile.num_warps, tile.num_stages)


def padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def steps(dtypes: Sequence[str], heads: Sequence[Heads]) -> list[Step]:
    return [
        Step(dtype, one.num // one.num_kv, one.dim, longest)
        for dtype in dtypes
        for one in heads
        for longest in (1, 100)
    ]


def compiled(pairs: Sequence[tuple[Step, int]]) -> list[tuple[Step, Compiled]]:
    found = compile_for([(step.launch(capability), capability) for step, capability in pairs])
    return [(step, one) for (step, _), one in zip(pairs, found, strict=True)]


def excess(found: Sequence[tuple[Step, Compiled]]) -> dict[str, list[str]]:
    """What is beyond the bounds, but for two reasons.

    ptxas of Triton 3.9 spills up to 24 bytes where that makes room for one more program. And a prompt's tile with heads
    of 256 has 8 warps of up to 244 registers: a smaller one would multiply less for each key that it reads.
    """
    return {
        f"{step} on sm_{one.capability}": beyond
        for step, one in found
        if (beyond := one.excess(spilled_bytes=32, registers=244 if step.dim == 256 and step.longest > 1 else 200))
    }


@pytest.mark.slow
def test_tiles_of_usual_models_fit_into_registers_and_shared_memory() -> None:
    everywhere = list(product(steps(["bfloat16"], [Heads(16, 8, 128)]), CAPABILITIES))
    on_hopper = steps(["bfloat16"], [Heads(14, 2, 64)]) + steps(["float32"], [Heads(16, 8, 128)])
    assert not excess(compiled([*everywhere, *((step, 90) for step in on_hopper)]))


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_every_tile_of_the_table_fits_into_registers_and_shared_memory() -> None:
    heads = [Heads(group, 1, dim) for group, dim in product((1, 7, 16), (24, 64, 80, 128, 256))]
    assert not excess(compiled(list(product(steps(list(ELEMENTS), heads), CAPABILITIES))))
