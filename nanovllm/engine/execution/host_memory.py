"""The host's memory: what this process may have of it, by control group, rlimit or machine, and what it has."""

from __future__ import annotations

import os
import resource
from pathlib import Path, PurePosixPath

_LIMITS = {"": ("memory.max", "memory.high"), "memory": ("memory.limit_in_bytes",)}
"""The files with a control group's limits, by controller: of version 2, which names none, and of version 1.

Above ``memory.high`` a process is not killed, but slowed down until it all but stands still.
"""


def memory_limit(proc: Path = Path("/proc/self"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may have at most: the least of the machine's memory and the limits set on it.

    These are its control groups' and ``RLIMIT_AS``, from which what is mapped and not resident is taken away.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        mapped, resident, _ = _memory(proc)
        limits.append(max(0, address_space - mapped + resident))
    for controller, group in _control_groups(proc):
        folder = groups / controller
        # A limit of an outer group holds too. In a container its own group is mounted as the root.
        for inner in (group, *group.parents):
            for name in _LIMITS[controller]:
                limits += _numbers(folder / inner.relative_to("/") / name)
    return min(limits)


def resident_bytes(proc: Path = Path("/proc/self")) -> int:
    """Bytes of memory that this process has now; 0 where the system does not tell."""
    return _memory(proc)[1]


def shared_bytes(proc: Path = Path("/proc/self")) -> int:
    """Those of them that are mapped from files, which other processes may have too; 0 where it does not tell."""
    return _memory(proc)[2]


def _memory(proc: Path) -> tuple[int, int, int]:
    """Bytes of memory: mapped, resident, and resident from files; 0 where the system does not tell."""
    try:
        mapped, resident, shared, *_ = map(int, (proc / "statm").read_text().split())
    except (OSError, ValueError):
        return 0, 0, 0
    page = os.sysconf("SC_PAGE_SIZE")
    return mapped * page, resident * page, shared * page


def _control_groups(proc: Path) -> list[tuple[str, PurePosixPath]]:
    """The process's control groups that may limit memory: their controllers and paths."""
    try:
        lines = (proc / "cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, *parts = line.split(":", 2)
        if len(parts) == 2 and parts[1].startswith("/"):
            found += [(name, PurePosixPath(parts[1])) for name in parts[0].split(",") if name in _LIMITS]
    return found


def _numbers(file: Path) -> list[int]:
    """The number in ``file``; none where there is no file, or the word ``max`` in it."""
    try:
        text = file.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdecimal() else []
