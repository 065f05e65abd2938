"""Programs in C++ that hold kernels against plain sums, and how they are compiled and run."""

from __future__ import annotations

import subprocess
from pathlib import Path

from nanovllm.engine import kernels

_FOLDER = Path(__file__).parent / "engine" / "kernel_programs"


def compile_program(compiler: str, name: str, folder: Path, *flags: str) -> Path:
    """The program ``name``.cpp in ``folder``; raises CalledProcessError, with the compiler's words on stderr."""
    program = folder / name
    command = [compiler, "-std=c++20", "-O1", "-ffp-contract=off", *flags, f"-I{Path(kernels.__file__).parent}"]
    subprocess.run([*command, str(_FOLDER / f"{name}.cpp"), "-o", str(program)], check=True, timeout=200)
    return program


def output_of(*command: str | Path) -> str:
    """What a command writes; AssertionError with it if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


STAND_IN = f"-I{_FOLDER / 'stand_in'}"
"""In place of torch's tensors, for a program that has no torch to link with."""
