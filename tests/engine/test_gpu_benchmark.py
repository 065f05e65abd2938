"""The benchmark for a GPU runs from end to end on a CPU, so that it does when a GPU is there."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )


def read(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def test_all_of_it_runs_in_little(tmp_path: Path) -> None:
    parts = "roofline,tests,kernels,parity-bfloat16,parity-float32,sanitizer,serve,decode,prefill,images,sweep,switches"
    done = run("--smoke", "--parts", parts, "--output", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = read(tmp_path / "gpu.json")["parts"]
    assert ",".join(found) == parts
    assert not [name for name, part in found.items() if "unfinished" in part]
    checks = {check["name"]: check for part in found.values() for check in part["checks"]}
    assert all(check["passed"] for check in checks.values())
    assert checks["kernels, bfloat16, 4 on 2 heads of 16, pages of 16"]["worst_error"] < 0.01
    assert {"float32, graphs", "bfloat16, chunks of 48", "bfloat16, images"} <= set(checks)
    assert checks["float32, warm prefix cache"]["cached_tokens"] > 0
    figures = {name: part["figures"] for name, part in found.items()}
    assert figures["serve"]["answer_tokens"] == figures["serve"]["transformers"]["tokens"]
    assert set(figures["decode"]["tokens_per_second"]) == set(figures["decode"]["transformers"]) == {"1", "4"}
    assert set(figures["images"]["against_transformers"]) == {"distinct", "repeating"}
    for figure in (figures["serve"], figures["prefill"]):
        assert figure["of_the_roofline"] > 0
    assert {"without graphs", "without overlap", "without fused layers", "drawn by torch"} <= set(figures["switches"])
    assert "left out" in figures["sanitizer"]["sanitizer"]
    assert "all right" in done.stdout
    assert "nano-vllm's workload, tokens/s" in done.stdout


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_from_its_file(tmp_path: Path) -> None:
    output = str(tmp_path / "gpu.json")
    cut = run("--smoke", "--parts", "roofline,prefill", "--limit", "1", "--output", output)
    assert cut.returncode == 3
    assert "--resume goes on with roofline, prefill" in cut.stdout
    assert read(tmp_path / "gpu.json")["parts"]["prefill"]["unfinished"] == "not begun: no time left"
    first = run("--smoke", "--parts", "roofline", "--processes", "--resume", "--output", output)
    assert first.returncode == 0, first.stdout + first.stderr[-3000:]
    roofline = read(tmp_path / "gpu.json")["parts"]["roofline"]
    rest = run("--smoke", "--parts", "roofline,prefill", "--resume", output, "--output", str(tmp_path / "whole.json"))
    assert rest.returncode == 0, rest.stdout + rest.stderr[-3000:]
    report = read(tmp_path / "whole.json")
    assert report["parts"]["roofline"] == roofline
    assert report["parts"]["prefill"]["figures"]["tokens_per_second"] > 0


def test_a_part_that_takes_too_long_is_cut_and_the_file_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = importlib.import_module("gpu")
    args = argparse.Namespace(option=[], smoke=True, shape="tiny", output=tmp_path / "gpu.json")
    report = gpu.run_child(args, "serve", 0.1, tmp_path)
    assert not report.is_finished("serve")
    assert read(tmp_path / "gpu.json")["parts"]["serve"]["unfinished"] == "cut after 0 s"


def test_a_file_of_an_earlier_script_is_refused(tmp_path: Path) -> None:
    output = str(tmp_path / "gpu.json")
    done = run("--smoke", "--parts", "roofline", "--resume", "benchmarks/results/gpu.json", "--output", output)
    assert done.returncode == 1
    assert "benchmarks/results/gpu.json is of an earlier script" in done.stderr


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run("--output", str(tmp_path / "gpu.json"))
    assert done.returncode == 2
    assert "there is no GPU" in done.stderr
