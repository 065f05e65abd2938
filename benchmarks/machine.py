"""What the figures were taken on, and how much of it others used meanwhile."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def describe_machine(command: str) -> dict[str, Any]:
    """The processor, its vector instructions, the software, and the load at the start."""
    return {
        "cpu": name_of_cpu(),
        "cpus": os.cpu_count(),
        "features": [name for name in _FEATURES if name in _cpuinfo("flags").split()],
        "amx": has_amx(),
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": command,
    }


def name_of_cpu() -> str:
    """What the processor calls itself."""
    return _cpuinfo("model name") or platform.machine()


def has_amx() -> bool:
    """Whether the processor has AMX tiles for bfloat16 and int8."""
    return {"amx_bf16", "amx_int8"} <= set(_cpuinfo("flags").split())


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def busy_seconds() -> float:
    """CPU time used since the start by all processes, and by a hypervisor's other guests; 0 where it is not told."""
    try:
        line = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return 0.0
    user, nice, system, _idle, _waiting, *others = (int(ticks) for ticks in line.split()[1:9])  # interrupts, stolen
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")
