"""vLLM for the tests: its interpreter, its server, and the small checkpoint that it and this engine both compute."""

from __future__ import annotations

import asyncio
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest
from checkpoints import make_qwen_vl
from parts import REPOSITORY

from nanovllm.demo.child_process import LocalProcess, free_port

CONTEXT = 1024
MAX_IMAGES = 3
LOAD_S = 900.0  # minutes, where it compiles or shares the machine
_SETUP = "sh benchmarks/peers/setup.sh vllm DIR makes one, and NANOVLLM_VLLM_PYTHON=DIR/bin/python names it"


def vllm_python() -> Path:
    """The interpreter of an environment with vLLM: ``NANOVLLM_VLLM_PYTHON``, or of ``PEERS``; skips without one."""
    peers = Path(os.environ.get("PEERS") or REPOSITORY.parent / "peers")
    python = Path(os.environ.get("NANOVLLM_VLLM_PYTHON") or peers / "vllm" / "bin" / "python")
    if not os.access(python, os.X_OK):
        pytest.skip(f"an environment with vLLM: {_SETUP}")
    return python


def vllm_environment(python: Path, settings: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of a process with vLLM; its CPU build wants Intel's OpenMP loaded first, and to know its cores."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("NANOVLLM_", "AWS_", "OMP_"))}
    openmp = [str(file) for file in sorted(python.parent.parent.glob("lib/**/libiomp5.so"))[:1]]
    cores = sorted(os.sched_getaffinity(0))
    return (
        inherited
        | {
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            **({"LD_PRELOAD": openmp[0]} if openmp else {}),
        }
        | dict(settings or {})
    )


def make_small_vl(directory: Path) -> Path:
    """A Qwen3-VL that vLLM's CPU attention takes: heads of 32."""
    return make_qwen_vl(directory, family="qwen3_vl")


class VllmServer:
    """vLLM's OpenAI server over a checkpoint, in float32, under the name ``tiny``."""

    def __init__(self, python: Path, checkpoint: Path, log: Path, *options: str) -> None:
        self._port = free_port()
        command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
        command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8", "--max-model-len", str(CONTEXT)]
        command += ["--limit-mm-per-prompt", f'{{"image": {MAX_IMAGES}, "video": 0}}', "--enable-prompt-tokens-details"]
        command += ["--structured-outputs-config", '{"backend": "guidance"}', *options]
        self._process = LocalProcess("vllm", command, log, env=vllm_environment(python))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    async def start(self) -> None:
        """Start it, and wait until it answers."""
        self._process.start()
        deadline = time.monotonic() + LOAD_S
        while not await asyncio.to_thread(self._is_up):
            if not self._process.is_running or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"vLLM's server does not answer: {self._process.tail(40)}")
            await asyncio.sleep(1.0)

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/models", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        self._process.stop(grace_s=20)

    def kill(self) -> None:
        self._process.kill()
