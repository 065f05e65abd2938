"""What a launch of a Triton kernel takes of a GPU, by compiling it for GPUs that need not be here.

A test passes launches to :func:`compile_for`. They are compiled by a child process, because the tests' own process
imports Triton as an interpreter (conftest.py) and holds no kernels to compile.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 89, 90, 120)
"""A100, L4 and RTX 40, H100 and H200, RTX 50 and RTX PRO."""
MAX_REGISTERS = 200  # of a thread: two programs of 4 warps, or one of 8, fit a multiprocessor's 65,536
MAX_SHARED_BYTES = 99 << 10  # of a program: all that sm_86, sm_89 and sm_120 have
ELEMENTS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
"""Triton's word for a pointer to elements of a torch type."""


@dataclass(frozen=True)
class Launch:
    """A kernel, ``module:name``, with what Triton specialises it for.

    ``types``: of each argument that is no constant, ``*bf16``, ``*fp32``, ``i32``, ``fp32``. ``aligned``: integers that
    are multiples of 16, as strides mostly are; pointers always count as such. An integer that is 1 is a constant,
    unless the kernel says ``do_not_specialize``.
    """

    kernel: str
    types: Mapping[str, str]
    constants: Mapping[str, int | float | bool | None]
    aligned: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of a launch: registers of a thread, bytes stored to and loaded from its stack, shared memory."""

    launch: Launch
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int

    def excess(self, *, registers: int = MAX_REGISTERS, spilled_bytes: int = 0) -> list[str]:
        """What is beyond the bounds of all kernels, empty if nothing is; only sm_90 is asked not to spill.

        A test that passes others than these bounds says why.
        """
        bounds = (
            ("registers", self.registers, registers),
            ("shared bytes", self.shared_bytes, MAX_SHARED_BYTES),
            ("spilled bytes", self.spilled_bytes if self.capability == 90 else 0, spilled_bytes),
        )
        return [f"sm_{self.capability}: {value} {what}, of {bound}" for what, value, bound in bounds if value > bound]


def missing() -> str | None:
    """What keeps kernels from being compiled here; None if nothing does."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def compile_for(launches: Sequence[tuple[Launch, int]]) -> list[Compiled]:
    """Each launch for the capability beside it; RuntimeError with the compiler's words where one fails.

    ``product(launches, CAPABILITIES)`` is all for all. Takes 5 s to start, and 0.3 to 1.5 s of CPU each.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="triton-") as cache:
        done = subprocess.run(
            [sys.executable, __file__],
            env={**environment, "PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "TRITON_CACHE_DIR": cache},
            input=json.dumps([[asdict(launch), capability] for launch, capability in launches]),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{done.stdout[-2000:]}\n{done.stderr[-5000:]}")
    lines = map(json.loads, done.stdout.splitlines())
    return [Compiled(launch, capability, **line) for (launch, capability), line in zip(launches, lines, strict=True)]


def _compile(launch: Launch, capability: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = launch.kernel.partition(":")
    kernel: Any = getattr(importlib.import_module(module), name)
    names = kernel.arg_names
    if unknown := {*launch.types, *launch.constants, *launch.aligned} ^ set(names):
        raise ValueError(f"{launch.kernel}: {sorted(unknown)} are missing, or are no arguments of it")
    aligned = [name for name, kind in launch.types.items() if kind.startswith("*")] + list(launch.aligned)
    said = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(
            ASTSource(
                kernel,
                {name: launch.types.get(name, "constexpr") for name in names},
                {(names.index(name),): value for name, value in launch.constants.items()},
                {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
            ),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
        )
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", said.getvalue())]
    spilled = [int(count) for count in re.findall(r"(\d+) bytes spill", said.getvalue())]
    return {
        "registers": max(registers), "spilled_bytes": sum(spilled), "shared_bytes": compiled.metadata.shared
    }  # fmt: skip


if __name__ == "__main__":
    said_before: dict[str, str] = {}  # two launches may be the same, and Triton's cache holds what ptxas said of none
    for pair in json.load(sys.stdin):
        key = json.dumps(pair)
        if key not in said_before:
            said_before[key] = json.dumps(_compile(Launch(**pair[0]), pair[1]))
        print(said_before[key], flush=True)
