"""The measured tree: its names for the same things, clocks, and rows of figures.

Topics are run in a process whose nanovllm is that of the tree; names that moved since 2a9ba20 are found by `find`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Row:
    """A cost by a size: ``values`` in ``unit`` by the number of ``grows_with``."""

    what: str
    unit: str
    grows_with: str
    values: dict[int, float]


def find(*places: str) -> Any:
    """The first ``module:name`` below nanovllm that the tree has. Raises LookupError where it has none."""
    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(import_module(f"nanovllm.{module}"), name)
        except (ImportError, AttributeError):
            continue
    raise LookupError(f"the tree has none of {places}")


def method(owner: Any, *names: str) -> Any:
    """The first of ``names`` that ``owner`` has."""
    return next(getattr(owner, name) for name in names if hasattr(owner, name))


def make_sequence(name: str, tokens: list[int], num_prompt: int, max_tokens: int, **changed: Any) -> Any:
    """A sequence of the tree; greedy unless ``changed`` has its ``sampling``."""
    Sequence = find("engine.scheduling.sequence:Sequence", "engine.sequence:Sequence")
    from nanovllm import SamplingParams

    sampling = changed.pop("sampling", None) or SamplingParams(temperature=0.0, max_tokens=max_tokens)
    if any(field.name == "detokenizer" for field in fields(Sequence)):
        changed["detokenizer"] = None
    return Sequence(name, tokens, num_prompt, sampling, max_tokens, **changed)


def best(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of ``repeats`` calls, without garbage collections."""
    gc.collect()
    gc.disable()
    try:
        return min(once(work) for _ in range(repeats))
    finally:
        gc.enable()


def once(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def rows_of(measure: Callable[[int], dict[tuple[str, str], float]], grows_with: str, sizes: Iterable[int]) -> list[Row]:
    """``measure`` at every size: the costs by what they are and their unit."""
    values: dict[tuple[str, str], dict[int, float]] = {}
    for size in sizes:
        for title, value in measure(size).items():
            values.setdefault(title, {})[size] = value
    return [Row(what, unit, grows_with, found) for (what, unit), found in values.items()]
