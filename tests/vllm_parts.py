"""vLLM for the tests: its interpreter, its server, the backend `vllm` in a process of its own, and a checkpoint."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_qwen_vl
from parts import REPOSITORY

from nanovllm import errors
from nanovllm.demo.child_process import LocalProcess, free_port
from nanovllm.engine.backends.base import EngineBackend, Generation, Request
from nanovllm.engine.backends.capabilities import Capabilities
from nanovllm.engine.outputs import (
    Completion,
    ImageUse,
    Logprob,
    ModelInfo,
    RequestOutput,
    RequestTimings,
    TokenChunk,
    TokenLogprobs,
    Usage,
)
from nanovllm.errors import EngineDead
from nanovllm.statistics import EngineStats
from nanovllm.vision.images.preprocess import ImageTransform, PreparedImage

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


class VllmProcess:
    """``vllm_program.py`` over a checkpoint: the backend `vllm`, for one `ProcessEngine` after another."""

    def __init__(self, python: Path, checkpoint: Path, log: Path, **extra_args: Any) -> None:
        self.port = free_port()
        command = [str(python), str(REPOSITORY / "tests" / "vllm_program.py"), str(checkpoint), str(self.port)]
        command += [str(CONTEXT), str(MAX_IMAGES), json.dumps(extra_args)]
        self._process = LocalProcess("vllm", command, log, env=vllm_environment(python))

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        self._process.start()
        deadline = time.monotonic() + LOAD_S
        while not await self._is_up():
            if not self._process.is_running or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"vLLM does not start: {self._process.tail(40)}")
            await asyncio.sleep(1.0)

    async def _is_up(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        return True

    def children(self) -> list[int]:
        """Ids of the processes of vLLM's engine."""
        children = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == self._process.pid:
                    children.append(int(entry.name))
        return children

    def tail(self) -> str:
        return self._process.tail(40)

    def stop(self) -> None:
        self._process.stop(grace_s=30)


class ProcessEngine(EngineBackend):
    """The backend in a `VllmProcess`, as a backend of this one."""

    name = "vllm"

    def __init__(self, process: VllmProcess) -> None:
        super().__init__(ModelInfo("", "", ""), ImageTransform.for_files("png"), 8)
        self._process = process
        self._stats: asyncio.Future[EngineStats] | None = None

    async def start(self) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._process.port, limit=1 << 26)
        hello = json.loads(await self._reader.readline())
        self.model_info = ModelInfo(**hello["model"])
        self.capabilities = Capabilities(context=hello["context"], images=hello["images"])
        self._reading = asyncio.create_task(self._read())

    def find_image(self, file_digest: bytes, cache_salt: bytes) -> PreparedImage | None:
        return None

    def _begin(self, request: Request, generation: Generation) -> None:
        fields = {name: getattr(request, name) for name in ("request_id", "prompt", "messages", "priority")}
        fields |= {"images": [base64.b64encode(one.file.data).decode() for one in request.images if one.file]}
        fields |= {"sampling": request.sampling.model_dump(mode="json"), "cache_salt": request.cache_salt.hex()}
        self._say(request=fields)

    def abort(self, request_id: str) -> None:
        self._say(abort=request_id)

    def stats(self) -> EngineStats:
        raise NotImplementedError("await process_stats()")

    async def process_stats(self) -> EngineStats:
        """Those of the backend."""
        self._stats = asyncio.get_running_loop().create_future()
        self._say(stats=True)
        return await self._stats

    async def close(self) -> None:
        self._die(EngineDead("the engine was closed"))
        self._reading.cancel()
        self._writer.close()

    def _say(self, **fields: Any) -> None:
        self._writer.write(json.dumps(fields).encode() + b"\n")

    async def _read(self) -> None:
        while line := await self._reader.readline():
            said = json.loads(line)
            if "stats" in said:
                assert self._stats is not None
                self._stats.set_result(EngineStats(**{**said["stats"], "endpoints": ()}))
                continue
            generation = self._generations[said["id"]]
            if "chunk" in said:
                chunk = said["chunk"]
                if chunk["finish_reason"] is None:
                    generation.deliver(TokenChunk(**{**chunk, "token_ids": tuple(chunk["token_ids"])}))
            elif "error" in said:
                del self._generations[said["id"]]
                name, message = said["error"]
                generation.fail(getattr(errors, name, RuntimeError)(message))
            else:
                del self._generations[said["id"]]
                output = _output(said["output"])
                generation.deliver(TokenChunk("", (), output.finish_reason), output)


def _output(said: dict[str, Any]) -> RequestOutput:
    """The inverse of ``json.dumps(output)``."""
    made = {
        "usage": Usage(**said["usage"]),
        "timings": RequestTimings(**said["timings"]),
        "images": tuple(ImageUse(**one) for one in said["images"]),
        "outputs": tuple(_completion(one) for one in said["outputs"]),
        "token_ids": tuple(said["token_ids"]),
        "logprobs": _logprobs(said["logprobs"]),
        "prompt_logprobs": _logprobs(said["prompt_logprobs"]),
    }
    return RequestOutput(**{**said, **made})


def _completion(said: dict[str, Any]) -> Completion:
    ends = said["text_ends"]
    made = {"token_ids": tuple(said["token_ids"]), "logprobs": _logprobs(said["logprobs"])}
    return Completion(**{**said, **made, "text_ends": None if ends is None else tuple(ends)})


def _logprobs(places: list[dict[str, dict[str, Any]]] | None) -> tuple[TokenLogprobs, ...] | None:
    if places is None:
        return None
    return tuple({int(token): Logprob(**one) for token, one in place.items()} for place in places)
