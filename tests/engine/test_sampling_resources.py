"""Registers, spills and shared memory of our sampling kernels, compiled for GPUs that need not be here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import triton_compile
from triton_compile import CAPABILITIES, ELEMENTS, Launch, compile_for

if (reason := triton_compile.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

LIMITS, DRAW = "nanovllm.engine.kernels.limits_triton", "nanovllm.engine.kernels.sampling_triton"
POINTERS = {
    "rows": "*i64", "limits": "*fp32", "keys": "*i64", "bests": "*fp32", "pivots": "*fp32", "sums": "*i64",
    "goals": "*i64", "found": "*i32", "cuts": "*fp32", "lasts": "*i32",
}  # fmt: skip
SEARCH = ("logits", "rows", "limits", "keys", "bests", "pivots", "sums", "goals")


def launches(dtype: str, share: int, padded: int) -> Iterator[Launch]:
    """Every kernel, as for a vocabulary of Qwen's: a multiple of 16."""
    shape = {"share": share, "padded": padded}

    def launch(kernel: str, names: tuple[str, ...], constants: dict[str, int | float | bool | None]) -> Launch:
        pointers = {"logits": ELEMENTS[dtype], **POINTERS}
        types = {name: pointers[name] for name in names} | {"vocab": "i32", "stride": "i32"}
        return Launch(kernel, types, constants, ("vocab", "stride"))

    yield launch(f"{LIMITS}:_best_kernel", ("logits", "rows", "limits", "bests"), {"share": share, "block": 1024})
    for pass_ in range(2):
        yield launch(f"{LIMITS}:_count_kernel", SEARCH, {**shape, "pass_": pass_, "block": 256})
    yield launch(f"{LIMITS}:_gather_kernel", (*SEARCH, "found"), {**shape, "block": 256})
    cut = launch(f"{LIMITS}:_cut_kernel", (*SEARCH, "found", "cuts", "lasts"), {"padded": padded, "block": 256})
    yield Launch(cut.kernel, {**cut.types, "parts": "i32"}, cut.constants, cut.aligned)
    for is_limited, is_searched in ((False, False), (True, False), (True, True)):
        constants = {**shape, "counters": 256, "is_limited": is_limited, "is_searched": is_searched}
        names = ("logits", "rows", "limits", "keys", "bests", "cuts", "lasts")
        draw = launch(f"{DRAW}:_draw_kernel", names, constants)
        yield Launch(draw.kernel, {**draw.types, "scores": "*fp32", "tokens": "*i32"}, constants, draw.aligned)
    types = {"scores": "*fp32", "tokens": "*i32", "drawn": "*i64", "parts": "i32"}
    yield Launch(f"{DRAW}:_combine_kernel", types, {"padded": padded}, num_warps=1)
    mask = launch(f"{DRAW}:_forbid_kernel", ("logits", "rows"), {"count": 4748, "words": 64})
    yield Launch(mask.kernel, {**mask.types, "masks": "*i32"}, mask.constants, mask.aligned)


def excess(pairs: list[tuple[Launch, int]]) -> list[list[str]]:
    return [beyond for one in compile_for(pairs) if (beyond := one.excess())]


@pytest.mark.slow
def test_sampling_fits_into_registers_and_shared_memory() -> None:
    everywhere = [one for one in launches("bfloat16", 4096, 64) if "count" in one.kernel or "cut" in one.kernel]
    pairs = [*product(launches("bfloat16", 4096, 64), (90,)), *product(everywhere, (80, 89, 120))]
    assert not excess(pairs)


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_sampling_of_every_type_and_share_fits_into_registers_and_shared_memory() -> None:
    sizes = ((4096, 64), (16384, 16), (4096, 256))
    assert not excess(
        [pair for one in product(ELEMENTS, sizes) for pair in product(launches(one[0], *one[1]), CAPABILITIES)]
    )
