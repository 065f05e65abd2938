"""The kernels for 64-bit ARM, compiled from their own sources and run in an emulator of such a CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from tests.kernel_programs import STAND_IN, compile_program, output_of

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason="needs the Debian packages g++-aarch64-linux-gnu and qemu-user",
)


def test_products_sum_as_plain_cpp_does_with_and_without_instructions_for_bytes(tmp_path: Path) -> None:
    program = compile_program(COMPILER, "panels", tmp_path, "-static", "-Wall", "-Wextra", "-Werror")
    assert output_of(EMULATOR, "-cpu", "cortex-a57", program) == "FMA (NEON); smull (NEON)"
    assert output_of(EMULATOR, "-cpu", "max", program) == "FMA (NEON); smull (NEON); sdot (NEON)"


def test_attention_tokens_and_draws_are_as_defined(tmp_path: Path) -> None:
    flags = ("-march=armv8-a", "-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT", STAND_IN)
    torch = [part for folder in include_paths("cpu") for part in ("-isystem", folder)]
    program = compile_program(COMPILER, "tokens", tmp_path, "-static", *flags, *torch)
    assert output_of(EMULATOR, "-cpu", "cortex-a57", program) == "4 lanes"
