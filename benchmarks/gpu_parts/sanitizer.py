"""compute-sanitizer on a small engine: reads and writes out of bounds, races in shared memory, uninitialised reads."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gpu_parts.bench import Bench, Finding

TOOLS = ("memcheck", "racecheck")
SECONDS = 60.0  # of a tool
FOUND = 86  # exit status


def check(bench: Bench) -> Iterator[Finding]:
    """A child that runs every kernel of an engine in small, under each tool; left out where there is no sanitizer."""
    program = find() if bench.is_cuda else None
    if program is None:
        yield {"sanitizer": "left out: " + ("there is none" if bench.is_cuda else "for a GPU alone")}
        return
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, "-m", "gpu_parts.smallest"]
        # Memory from torch's cache would hide what is read past an allocation.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "SMALLEST": str(bench.directory)}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            yield {f"sanitizer_{tool}": f"left out: not done in {SECONDS:.0f} s"}
            continue
        told = done.stdout + done.stderr
        if done.returncode not in (0, FOUND) and "Device not supported" in told:
            yield {f"sanitizer_{tool}": "left out: it does not support this device"}
            continue
        yield {
            "name": f"compute-sanitizer, {tool}",
            "passed": done.returncode == 0,
            "told": told[-300:] if done.returncode == 0 else told[:1500] + told[-1500:],
        }


def find() -> str | None:
    """The sanitizer's path: on PATH, in the toolkit, or in a wheel of NVIDIA's."""
    name = "compute-sanitizer"
    homes = [os.environ[one] for one in ("CUDA_HOME", "CUDA_PATH") if one in os.environ] + ["/usr/local/cuda"]
    places = [Path(home, *folder) for home in homes for folder in (("bin",), ("compute-sanitizer",))]
    if (spec := importlib.util.find_spec("nvidia")) is not None:
        for root in spec.submodule_search_locations or ():
            places += [file.parent for file in Path(root).glob(f"*/**/{name}")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, places)))
