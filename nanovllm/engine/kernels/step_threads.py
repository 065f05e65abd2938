"""Threads that the kernels of a step share, awake while it runs and asleep between steps: see step_threads.h."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from nanovllm.engine import kernels


class Counts(NamedTuple):
    """What the threads of this process did so far: ``pauses`` are turns of waiting without sleep."""

    threads: int
    kernels: int
    sleeps: int
    pauses: int


def why_not() -> str | None:
    """Why kernels share OpenMP's threads, which sleep or spin as its variables say; None where a step has its own."""
    if kernels.missing() is not None:
        return "there are no kernels"
    if torch.get_num_threads() < 2:
        return "there is one thread"
    if torch.get_num_threads() > (quota := cpu_quota()):
        return f"there are more threads than the {quota:g} CPUs of the control group"
    if openmp_spins():
        return "OpenMP's threads spin while they wait, and would have the others' cores: set GOMP_SPINCOUNT=0"
    return None


def openmp_spins() -> bool:
    """Whether OpenMP's threads wait for their next work without sleeping, by the variables that it has read."""
    if count := os.environ.get("GOMP_SPINCOUNT", "").strip():
        return count != "0"
    return os.environ.get("OMP_WAIT_POLICY", "").strip().upper() != "PASSIVE"


@functools.cache
def cpu_quota(groups: Path = Path("/sys/fs/cgroup")) -> float:
    """The CPUs' time that a container's control group (version 2) has in a second, in seconds; inf where it has all."""
    try:
        quota, period = (groups / "cpu.max").read_text().split()
        return float(quota) / float(period) if quota != "max" else float("inf")
    except (OSError, ValueError):
        return float("inf")


@contextmanager
def awake() -> Iterator[None]:
    """A step of the calling thread: its kernels share threads that stay awake in between.

    Where another thread's step has them, or there are none (`why_not`), the kernels share OpenMP's as they do outside
    of a step.
    """
    begun = why_not() is None and torch.ops.nanovllm.begin_step()
    try:
        yield
    finally:
        if begun:
            torch.ops.nanovllm.end_step()


def counts() -> Counts:
    """See `Counts`; the kernels must be there."""
    return Counts(*torch.ops.nanovllm.step_thread_counts())
