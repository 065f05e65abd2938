"""The benchmark for a GPU runs from end to end on a CPU, so that it does when a GPU is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_all_of_it_runs_in_little(tmp_path: Path) -> None:
    done = run("--smoke", "--output", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    checks = {check["name"]: check for check in report["checks"]}
    assert all(check["passed"] for check in checks.values())
    assert checks["kernels, bfloat16, 4 on 2 heads of 16, pages of 16"]["worst_error"] < 0.01
    assert {"float32, graphs", "bfloat16, chunks of 48", "bfloat16, images"} <= set(checks)
    assert checks["float32, warm prefix cache"]["cached_tokens"] > 0
    assert set(report["figures"]["graphs_against_none"]) == {"1", "4"}
    assert "all right" in done.stdout
    assert "attention: " in done.stdout


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run("--output", str(tmp_path / "gpu.json"))
    assert done.returncode == 2
    assert "there is no GPU" in done.stderr
