"""Registers, spills and shared memory of the fused kernels of a layer, compiled for GPUs that need not be here.

What is compiled is what the engine launches: launches are noted on tensors without memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
import triton_compile
from torch import Tensor
from triton_compile import CAPABILITIES, ELEMENTS, Compiled, Launch, compile_for

if (reason := triton_compile.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from nanovllm.engine.attention.selection import Heads
from nanovllm.engine.kernels import norm_triton, rotary_triton, silu_triton

POINTERS = {getattr(torch, name): pointer for name, pointer in ELEMENTS.items()} | {torch.int64: "*i64"}


@dataclass(frozen=True)
class Model:
    """The shape of a layer."""

    heads: Heads
    hidden: int
    intermediate: int
    has_norm: bool = False


QWEN3_0_6B = Model(Heads(16, 8, 128), 1024, 3072, has_norm=True)
LLAMA_3_405B = Model(Heads(128, 8, 128), 16384, 53248)
MODELS = (
    QWEN3_0_6B,
    LLAMA_3_405B,
    Model(Heads(6, 3, 24), 144, 432, has_norm=True),
    Model(Heads(14, 2, 64), 896, 4864),
    Model(Heads(32, 32, 80), 2560, 6912),
    Model(Heads(8, 4, 256), 2304, 9216, has_norm=True),
)


class NotedKernel:
    """A kernel whose launches are noted, and not made."""

    def __init__(self, module: ModuleType, name: str, launches: list[Launch]) -> None:
        self._path, self._names, self._launches = f"{module.__name__}:{name}", getattr(module, name).arg_names, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._note

    def _note(self, *args: Any, num_warps: int, **constants: Any) -> None:
        given = dict(zip(self._names, args, strict=False))
        # What Triton does with an integer that is 1.
        constants |= {name: 1 for name, value in given.items() if type(value) is int and value == 1}
        types = {
            name: POINTERS[value.dtype] if isinstance(value, Tensor) else "fp32" if type(value) is float else "i32"
            for name, value in given.items()
            if name not in constants
        }
        aligned = [name for name in types if type(given[name]) is int and given[name] % 16 == 0]
        self._launches.append(Launch(self._path, types, constants, aligned, num_warps))


@contextmanager
def noted() -> Iterator[list[Launch]]:
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (norm_triton, rotary_triton, silu_triton):
            (name,) = (name for name in vars(module) if name.endswith("_kernel"))
            patch.setattr(module, name, NotedKernel(module, name, launches))
        yield launches


def launches_of(model: Model, dtype: torch.dtype) -> list[Launch]:
    """Of a layer, on a step of a few tokens."""

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens, heads = 4, model.heads
    rotated = heads.num + heads.num_kv
    norm = make(rotated, heads.dim) if model.has_norm else None
    with noted() as launches:
        norm_triton.add_rms_norm(make(tokens, model.hidden), make(tokens, model.hidden), make(model.hidden), 1e-6)
        rotary_triton.rotate_and_write(
            make(tokens, rotated + heads.num_kv, heads.dim),
            norm,
            1e-6,
            *make(tokens, 2, 1, heads.dim).unbind(1),
            *make(64, 2, heads.num_kv, heads.dim).unbind(1),
            make(tokens, dtype=torch.int64),
        )
        silu_triton.gated_silu(make(tokens, 2 * model.intermediate))
    assert len(launches) == 3
    return launches


def unfit(pairs: Sequence[tuple[Launch, int]]) -> list[Compiled]:
    """Those beyond the bounds of all kernels, and those that spill, on whatever GPU."""
    return [one for one in compile_for(pairs) if one.excess() or one.spilled_bytes]


@pytest.mark.slow
def test_kernels_of_usual_models_fit_into_registers_and_spill_nothing() -> None:
    everywhere = product(launches_of(QWEN3_0_6B, torch.bfloat16), CAPABILITIES)
    assert not unfit([*everywhere, *((launch, 90) for launch in launches_of(LLAMA_3_405B, torch.float32))])


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_kernels_of_every_shape_fit_into_registers_and_spill_nothing() -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    launches = [launch for model, dtype in product(MODELS, dtypes) for launch in launches_of(model, dtype)]
    assert not unfit(list(product(launches, CAPABILITIES)))
