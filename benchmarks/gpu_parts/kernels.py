"""Our kernels for GPUs alone: their tests without the interpreter, and attention against plain torch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from gpu_parts.bench import Bench, Finding, guarded
from nanovllm.engine.attention.base import AttentionBackend
from nanovllm.engine.attention.selection import TOLERANCES, Heads, choose_backend, trial

REPOSITORY = Path(__file__).resolve().parents[2]


def tests(bench: Bench) -> Iterator[Finding]:
    """The tests that a CPU runs in Triton's interpreter: here on the GPU, in the smoke test interpreted."""
    modules = sorted((REPOSITORY / "tests" / "engine").glob("test_*.py"))
    files = [module for module in modules if "import triton_interpreter" in module.read_text(encoding="utf-8")]
    if importlib.util.find_spec("pytest") is None:
        yield {"tests": "left out: pytest is not installed"}
        return
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if not bench.is_cuda:
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory(prefix="nanovllm-tests-") as directory:
        results = Path(directory) / "results.xml"
        # Kept from tests/conftest.py, which wants brokers' clients, and from plugins, which want their own settings.
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--confcutdir={REPOSITORY}/tests/engine",
            "-W", "ignore::pytest.PytestConfigWarning", f"--junitxml={results}", "-m", "not proof",
            *(["-k", bench.scale.tests] if bench.scale.tests else []), *map(str, files),
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, errors="replace", check=False
        )
        if not results.is_file():
            yield {"name": "tests", "passed": False, "error": (done.stdout + done.stderr)[-3000:]}
            return
        cases = list(ElementTree.parse(results).iter("testcase"))
    bad = {f"{case.get('classname')}::{case.get('name')}": told for case in cases if (told := _fault(case))}
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    ran = len(cases) - len(skipped)
    yield {"files": [file.name for file in files], "ran": ran, "skipped": skipped, "seconds": _seconds(cases)}
    yield {"name": f"tests of kernels, {ran} run", "passed": not bad and ran > 0, "told": _summary(done.stdout)}
    for name, told in bad.items():
        yield {"name": name, "passed": False, "error": told}


def _fault(case: ElementTree.Element) -> str | None:
    for kind in ("failure", "error"):
        if (found := case.find(kind)) is not None:
            return f"{found.get('message') or ''}\n{(found.text or '')[-1500:]}"
    return None


def _seconds(cases: list[ElementTree.Element]) -> float:
    return round(sum(float(case.get("time") or 0) for case in cases), 1)


def _summary(output: str) -> str:
    return output.strip().rpartition("\n")[2]


def check(bench: Bench) -> Iterator[Finding]:
    """Attention alone against plain torch in float64: our Triton kernel on CUDA, an engine's choice on a CPU."""
    device = torch.device(bench.device)

    def checked(name: str, precision: str, heads: Heads, page: int) -> Finding:
        dtype = getattr(torch, precision)
        backend = _backend(device, dtype, page)
        error = trial(backend, device, dtype, heads)
        return {"name": name, "passed": error <= TOLERANCES[dtype], "attention": backend.name, "worst_error": error}

    if bench.is_cuda and importlib.util.find_spec("triton") is None:
        yield {"kernels": "left out: Triton is not installed"}
        return
    for dtype in bench.scale.dtypes:
        for heads, page in bench.scale.kernels:
            name = f"kernels, {dtype}, {heads.num} on {heads.num_kv} heads of {heads.dim}, pages of {page}"
            yield guarded(name, partial(checked, name, dtype, heads, page))


def _backend(device: torch.device, dtype: torch.dtype, page: int) -> AttentionBackend:
    if device.type == "cpu":
        return choose_backend(device, dtype, page)
    from nanovllm.engine.attention.triton_paged import TritonAttention

    return TritonAttention(device, page)
