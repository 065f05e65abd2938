"""AMX tiles in the tests: the CPU's own, or those of ``amx_emulator.cpp``."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nanovllm.engine.kernels import tiles
from nanovllm.engine.layers import product_choice
from nanovllm.engine.layers.product_choice import Choice

_SOURCE = Path(__file__).with_name("amx_emulator.cpp")
_KINDS = ("configure", "release", "zero", "load", "store", "bfloat16", "bytes")


@functools.cache
def missing() -> str | None:
    """What keeps the emulator from running here; None if nothing does."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "what is multiplied by tiles lies in panels, which need AVX-512"
    return None if _compiler() else "there is no C++ compiler"


@contextmanager
def emulated() -> Iterator[Emulator]:
    """Tile instructions that the CPU refuses are carried out by the emulator, in this process and its threads."""
    emulator = _emulator()
    emulator.library.amx_install()
    try:
        yield emulator
    finally:
        emulator.library.amx_uninstall()


class Emulator:
    """The emulator's library; its counters stay at zero on a CPU that has tiles itself."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.amx_executed.restype = library.amx_configured_threads.restype = ctypes.c_int64

    def executed(self) -> dict[str, int]:
        """Instructions carried out since the start, by kind, of all threads."""
        return {kind: self.library.amx_executed(number) for number, kind in enumerate(_KINDS)}

    def configured_threads(self) -> int:
        """Threads that hold tiles now."""
        return int(self.library.amx_configured_threads())


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@functools.cache
def _emulator() -> Emulator:
    """Raises subprocess.CalledProcessError: the compiler failed, as an assembler does that knows no tiles."""
    compiler = _compiler()
    assert compiler is not None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "amx_emulator.so")
        flags = ("-shared", "-fPIC", "-std=c++20", "-O3", "-mfma", "-mavx512f", "-ffp-contract=off")
        subprocess.run([compiler, *flags, str(_SOURCE), "-o", str(library)], check=True)
        return Emulator(ctypes.CDLL(str(library)))


@contextmanager
def granted(monkeypatch: pytest.MonkeyPatch, choice: Choice) -> Iterator[Emulator]:
    """Engines of this process may use tiles, and choose instructions as if ``choice`` had been measured."""
    monkeypatch.setattr(tiles, "why_not", lambda: None)
    monkeypatch.setattr(product_choice, "recorded", lambda *_: choice)
    product_choice.choose.cache_clear()
    try:
        with emulated() as emulator:
            yield emulator
    finally:
        product_choice.choose.cache_clear()
