"""Triton's kernels in the tests: on a GPU if there is one, else in Triton's interpreter, as conftest.py told it."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import numpy as np
import torch

_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if _IS_INTERPRETED else "cuda")


@functools.cache
def missing() -> str | None:
    """What keeps kernels from running here; None if nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not _IS_INTERPRETED:
        return None if torch.cuda.is_available() else "torch sees no GPU here, and TRITON_INTERPRET is not 1"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        return f"the interpreter of Triton {triton.__version__} is older than numpy 2.4"
    _teach_bfloat16()
    _patch_once()
    return None


def _teach_bfloat16() -> None:
    """The interpreter keeps bfloat16 as integers: its ``tl.dot`` multiplies those, and what it stores it cuts off.

    So operands are widened first, and float32 is rounded to the nearest, as GPUs do it.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot
    cast = interpreter.InterpreterBuilder.cast_impl

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, left: Any, right: Any, *rest: Any, **options: Any) -> Any:
        return multiply(self, wide(left), wide(right), *rest, **options)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        bits = torch.from_numpy(np.atleast_1d(source.data)).to(torch.bfloat16).view(torch.int16).numpy()
        return interpreter.TensorHandle(bits.view(np.uint16).reshape(source.data.shape), tl.bfloat16)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.cast_impl = cast_impl


def _patch_once() -> None:
    """Patch the language once a launch for each module of functions, and not at each call, which takes most time."""
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if self.fn.__module__ not in patched:
            patched.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **options)

    def launched(self: Any, *args: Any, **options: Any) -> Any:
        patched.clear()
        return launch(self, *args, **options)

    interpreter.InterpretedFunction.__call__ = call
    interpreter.GridExecutor.__call__ = launched
