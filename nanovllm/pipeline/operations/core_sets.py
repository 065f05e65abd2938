"""Core sets: the cores that this process may use, divided among replicas by NUMA node and physical core."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from nanovllm.errors import ConfigurationError, counted

Item = TypeVar("Item")
_SYSTEM = Path("/sys/devices/system")


def core_sets(replicas: int, system: Path = _SYSTEM) -> list[tuple[int, ...]]:
    """The numbers of each replica's cores, of those in this process's affinity.

    Raises ConfigurationError where there are fewer cores than replicas, and where the system has no affinity.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise ConfigurationError(f"replicas={replicas}: this system binds no process to cores; Linux does")
    cores = os.sched_getaffinity(0)
    if replicas > len(cores):
        raise ConfigurationError(
            f"replicas={replicas}, and this process may use {counted(len(cores), 'core')}: set {len(cores)} at most, "
            "or give it more cores"
        )
    return divide(cores_by_node(cores, system), replicas)


def cores_by_node(cores: set[int], system: Path = _SYSTEM) -> list[list[int]]:
    """``cores`` of each NUMA node that has some, threads of one physical core side by side."""
    nodes = [_listed(file) for file in sorted((system / "node").glob("node[0-9]*/cpulist"), key=_number_of_node)]
    known = [sorted(cores & node, key=lambda core: (_physical(core, system), core)) for node in nodes if cores & node]
    rest = cores.difference(*known)
    return [*known, *([sorted(rest)] if rest else [])]


def divide(nodes: Sequence[Sequence[int]], replicas: int) -> list[tuple[int, ...]]:
    """A replica's cores lie in one node where there are as many replicas as nodes; else it has whole nodes."""
    if replicas <= len(nodes):
        return [tuple(core for node in part for core in node) for part in _parts(nodes, replicas)]
    counts = [1] * len(nodes)
    for _ in range(replicas - len(nodes)):
        fullest = max(range(len(nodes)), key=lambda index: len(nodes[index]) / counts[index])
        counts[fullest] += 1
    return [tuple(part) for node, count in zip(nodes, counts, strict=True) for part in _parts(node, count)]


def _parts(items: Sequence[Item], count: int) -> list[Sequence[Item]]:
    """``items`` in ``count`` runs, whose lengths differ by one at most."""
    ends = [len(items) * index // count for index in range(count + 1)]
    return [items[begin:end] for begin, end in pairwise(ends)]


def _physical(core: int, system: Path) -> int:
    """The first thread of the physical core that ``core`` is a thread of."""
    return min(_listed(system / "cpu" / f"cpu{core}" / "topology" / "thread_siblings_list") or {core})


def _number_of_node(file: Path) -> int:
    return int(file.parent.name.removeprefix("node"))


def _listed(file: Path) -> set[int]:
    """The numbers in a list such as ``0-3,8``; none where it cannot be read."""
    try:
        text = file.read_text().strip()
    except OSError:
        return set()
    numbers: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers
