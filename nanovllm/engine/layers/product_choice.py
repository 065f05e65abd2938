"""Instructions for products with panels, by number of rows: measured once a kind of machine, and recorded.

No flag of a CPU tells which are fastest: `vdpbf16ps` is twice as fast as products in float32 on one maker's CPUs, and
slower on another's. The record lies beside the compiled kernels: an edited one counts, and without it the next start
measures.

With ``deterministic=True`` no bit may follow from a measurement, which replicas make on their own. Tiles of int8, and
bfloat16 multiplied as floats, have the bits of vectors, so they may be mixed. Tiles of bfloat16 have other bits: there
that mode multiplies all rows by tiles wherever the process has them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanovllm.engine import kernels
from nanovllm.engine.kernels import tiles
from nanovllm.errors import counted

logger = logging.getLogger(__name__)

_ROWS = (1, 2, 4, 8, 16, 32)
_INPUTS = 1024
_WEIGHT_BYTES = 2 << 20  # multiplied in a millisecond or so: a busy neighbour leaves some turns alone
_WEIGHTS = 8  # one after another, so that they come from beyond a core's own cache, as those of a model do
_BUDGET_S = 0.15  # for a type
_LEAST_TURNS = 4
_LEAST_GAIN = 0.03  # of the time: what differs by less is left as it is
_CPU_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")

Microseconds = dict[str, list[float]]


@dataclass(frozen=True)
class Choice:
    """Numbers of rows from which on bfloat16 is multiplied as floats, and either type by tiles; None: never."""

    floats_from: int | None = None
    tiles_from: int | None = None


@functools.cache
def choose(dtype: torch.dtype, *, deterministic: bool = False) -> Choice:
    """The instructions for weights of ``dtype`` in panels, under inputs of their own type."""
    if dtype not in (torch.bfloat16, torch.int8):
        return Choice()
    can_have_tiles = tiles.why_not() is None
    if dtype == torch.bfloat16 and can_have_tiles and deterministic:
        return Choice(tiles_from=1)
    if dtype == torch.int8 and not can_have_tiles:
        return Choice()
    return recorded(dtype, can_have_tiles)


def describe(dtype: torch.dtype, choice: Choice) -> str:
    """``choice`` in words, such as ``vectors, from 8 rows on tiles``."""
    limits = {"float32 vectors of the same bits": choice.floats_from, "AMX tiles": choice.tiles_from}
    if dtype != torch.bfloat16:
        limits.pop("float32 vectors of the same bits")
    parts = [f"from {counted(rows, 'row')} on {kind}" for kind, rows in limits.items() if rows is not None]
    return ", ".join(["vectors of its own type", *parts])


def record_path() -> Path:
    """Where the choices of this kind of machine, kernels and number of threads are kept."""
    library = kernels.kept(kernels.kind())
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        lines = []
    cpu = [line for line in lines if line.partition(":")[0].strip() in _CPU_FIELDS]
    kind = "\n".join((library.name, str(torch.get_num_threads()), str(tiles.why_not()), *cpu))
    return library.with_name(f"products-{hashlib.sha256(kind.encode()).hexdigest()[:24]}.json")


def recorded(dtype: torch.dtype, can_have_tiles: bool) -> Choice:
    """The choice that was measured once, or is now."""
    path, name = record_path(), str(dtype).removeprefix("torch.")
    record = _read(path)
    try:
        return _validated(Choice(**record[name]["choice"]))
    except (KeyError, TypeError):
        pass
    started = time.perf_counter()
    found = measure(dtype, can_have_tiles)
    choice = choice_from(found)
    logger.info("measured in %.2f s how %s is multiplied fastest: %s", time.perf_counter() - started, name, choice)
    _write(path, {**_read(path), name: {"choice": asdict(choice), "rows": _ROWS, "microseconds": found}})
    return choice


def _validated(choice: Choice) -> Choice:
    """Raises TypeError: a number of rows is none."""
    for rows in (choice.floats_from, choice.tiles_from):
        if rows is not None and (type(rows) is not int or rows < 0):
            raise TypeError(f"{rows!r} is no number of rows")
    return choice


def _read(path: Path) -> dict[str, Any]:
    try:
        kernels.check_ownership(path)
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write(path: Path, record: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(record, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("the measured choice cannot be kept in %s, every start measures: %s", path.parent, error)


@torch.inference_mode()
def measure(dtype: torch.dtype, can_have_tiles: bool) -> Microseconds:
    """Microseconds of one product by number of rows (`_ROWS`), for each kind of instructions that can be chosen.

    By turns, the fastest of some: a busy neighbour slows single turns, and all kinds alike.
    """
    group = 4 // dtype.itemsize
    num_panels = _WEIGHT_BYTES // (_INPUTS * 48 * dtype.itemsize)
    weights = torch.ones((_WEIGHTS, num_panels, _INPUTS // group, 48, group), dtype=dtype)
    width = 48 * num_panels
    ones = torch.ones(width)
    per_output = (None, ones, ones.int()) if dtype == torch.int8 else (None, None, None)
    kinds = {"vectors": Choice()}
    if dtype == torch.bfloat16 and _floats_have_equal_bits():
        kinds["floats"] = Choice(floats_from=0)
    if can_have_tiles:
        kinds["tiles"] = Choice(tiles_from=0)
    inputs = [torch.ones(rows, _INPUTS, dtype=torch.bfloat16) for rows in _ROWS]
    fastest = {kind: [math.inf] * len(_ROWS) for kind in kinds}
    until = time.perf_counter() + _BUDGET_S
    order = itertools.cycle(weights)
    turns = 0
    while turns < _LEAST_TURNS or time.perf_counter() < until:
        turns += 1
        for number, x in enumerate(inputs):
            for kind, choice in kinds.items():
                panels = next(order)
                started = time.perf_counter()
                multiply(x, panels, width, per_output, choice)
                took = round((time.perf_counter() - started) * 1e6, 1)
                fastest[kind][number] = min(fastest[kind][number], took)
    return fastest


def multiply(
    x: Tensor, panels: Tensor, width: int, per_output: Sequence[Tensor | None], choice: Choice = Choice()
) -> Tensor:
    """x [..., in] times ``width`` outputs in panels; ``per_output``: bias, scales and excess."""
    product: Tensor = torch.ops.nanovllm.multiply_panels(
        x, panels, width, *per_output, choice.floats_from, choice.tiles_from
    )
    return product


def choice_from(found: Microseconds) -> Choice:
    """The choice that loses least over all measured numbers of rows."""
    base, floats_from, tiles_from = found["vectors"], None, None
    if "floats" in found:
        floats_from = _limit(base, found["floats"])
        base = [
            floats if floats_from is not None and rows >= floats_from else vectors
            for rows, vectors, floats in zip(_ROWS, base, found["floats"], strict=True)
        ]
    if "tiles" in found:
        tiles_from = _limit(base, found["tiles"])
    return Choice(floats_from, tiles_from)


def _limit(base: Sequence[float], other: Sequence[float]) -> int | None:
    """The number of rows from which on ``other`` is chosen: its gains from there on add up to the most."""
    gains = [math.log(b / o) - _LEAST_GAIN for b, o in zip(base, other, strict=True)]
    totals = [sum(gains[first:]) for first in range(len(gains))]
    most = max(totals)
    return _ROWS[totals.index(most)] if most > 0 else None


def _floats_have_equal_bits() -> bool:
    """Whether products in float32 have the bits of this CPU's instruction for bfloat16, denormal numbers included."""
    generator = torch.Generator().manual_seed(0)
    x, panels = (
        torch.randn(shape, generator=generator).mul(2.0 ** torch.randint(-90, 8, shape, generator=generator)).bfloat16()
        for shape in ((16, 128), (2, 64, 48, 2))
    )
    none = (None, None, None)
    return torch.equal(multiply(x, panels, 96, none, Choice(floats_from=0)), multiply(x, panels, 96, none))
