"""Confinement of child processes that work on what messages hold: no credentials, bounded resources, no debugging.

Linux gives processes of one user each other's memory and environment through ``/proc`` and ``ptrace(2)``. A parent that
is not dumpable (``prctl(2)``, ``PR_SET_DUMPABLE``) denies both to processes without ``CAP_SYS_PTRACE``; a child of root
has that capability, and gives all of its own up.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import sysconfig
from pathlib import Path
from typing import BinaryIO

INHERITED_VARIABLES = ("LANG", "LC_ALL", "LD_LIBRARY_PATH")
"""The locale, and the search path of shared libraries."""

MAX_OPEN_FILES = 64
_PR_SET_DUMPABLE = 4
_CAPABILITY_VERSION_3 = 0x20080522  # capset(2): two sets of 32 capabilities


def environment() -> dict[str, str]:
    """The whole environment of a confined process: shared libraries, locale, the path of this package, one thread."""
    inherited = {name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
    root = str(Path(__file__).resolve().parents[1])
    # An installed package is found without it, and its neighbours on PYTHONPATH would shadow the standard library.
    if root != sysconfig.get_path("purelib"):
        inherited["PYTHONPATH"] = root
    return {**inherited, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def forbid_debugging() -> None:
    """Deny other processes of this user this process's memory and environment; without effect outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def take_over_streams() -> tuple[BinaryIO, BinaryIO]:
    """Standard input, and standard output as it was: what a library prints goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return sys.stdin.buffer, answers


def confine(memory_bytes: int | None) -> None:
    """Bound this process's address space and open files; no core dumps, no writes to files, no capabilities."""
    for limit, value in (
        *([] if memory_bytes is None else [(resource.RLIMIT_AS, memory_bytes)]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
    ):
        _, hard = resource.getrlimit(limit)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (bound, bound))
    if sys.platform == "linux" and os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        if ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()):
            raise OSError("the capabilities of a confined process could not be given up")
