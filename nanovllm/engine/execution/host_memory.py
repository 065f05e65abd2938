"""The host's memory: what this process may have of it, by its control group or the machine, and what it has."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

_LIMITS = {"": "memory.max", "memory": "memory.limit_in_bytes"}
"""The file with a control group's limit, by controller: of version 2, which names none, and of version 1."""


def memory_limit(proc: Path = Path("/proc/self"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may have at most: the least of the machine's memory and its control groups' limits."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for controller, group in _control_groups(proc):
        folder = groups / controller
        # A limit of an outer group holds too. In a container its own group is mounted as the root.
        for inner in (group, *group.parents):
            limits += _numbers(folder / inner.relative_to("/") / _LIMITS[controller])
    return min(limits)


def resident_bytes(proc: Path = Path("/proc/self")) -> int:
    """Bytes of memory that this process has now; 0 where the system does not tell."""
    try:
        pages = int((proc / "statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _control_groups(proc: Path) -> list[tuple[str, PurePosixPath]]:
    """The process's control groups that may limit memory: their controllers and paths."""
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        found += [(name, PurePosixPath(path)) for name in controllers.split(",") if name in _LIMITS]
    return found


def _numbers(file: Path) -> list[int]:
    """The number in ``file``; none where there is no file, or the word ``max`` in it."""
    try:
        text = file.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdecimal() else []
