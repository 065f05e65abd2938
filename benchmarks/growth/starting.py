"""A start: imports, loading, and the first answer, each once in a process of its own, against the model's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.growth.tree import Row

CHECKPOINTS = "GROWTH_CHECKPOINTS"
"""The environment variable that names the checkpoints, by their parameters: a JSON object."""

_PROGRAM = """
import json, sys, time
began = time.perf_counter()
from nanovllm import LLM, SamplingParams
imported = time.perf_counter()
llm = LLM(sys.argv[1])
loaded = time.perf_counter()
llm.generate([[5] * 16], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
print(json.dumps([imported - began, loaded - imported, time.perf_counter() - loaded]))
"""
_PHASES = ("imports", "engine made", "first answer")


def measure(is_tiny: bool) -> list[Row]:
    """Of each checkpoint the faster of two starts; kernels are compiled and pages cached by the first."""
    values: dict[str, dict[int, float]] = {phase: {} for phase in _PHASES}
    for parameters, directory in json.loads(os.environ[CHECKPOINTS]).items():
        starts = [_start(Path(directory)) for _ in range(1 if is_tiny else 3)]
        for phase, *seconds in zip(_PHASES, *starts, strict=True):
            values[phase][int(parameters)] = min(seconds)
    return [Row(f"start: {phase}", "s", "parameters", found) for phase, found in values.items()]


def _start(directory: Path) -> list[float]:
    command = [sys.executable, "-c", _PROGRAM, str(directory)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    phases: list[float] = json.loads(output.splitlines()[-1])
    return phases
