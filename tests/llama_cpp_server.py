"""llama.cpp's own server for the tests, a process on a real socket, in front of a small random checkpoint."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoint_files import edit_tensors
from checkpoints import make_qwen3, make_tokenizer
from gguf_checkpoints import write_gguf
from parts import REPOSITORY, eventually, program_of
from torch import Tensor

from nanovllm.demo.child_process import LocalProcess, free_port

MODEL = "small"
SLOTS, SLOT_TOKENS, CONTEXT = 2, 512, 16_384
WHERE = "llama.cpp's server: no LLAMA_SERVER, and none built by benchmarks/peers/setup.sh llama.cpp ../peers/llama.cpp"


def llama_server_program() -> Path | None:
    """The server: ``LLAMA_SERVER``, or the one that benchmarks/peers/setup.sh built beside the repository."""
    return program_of("LLAMA_SERVER", REPOSITORY.parent / "peers" / "llama.cpp" / "build" / "bin" / "llama-server")


def make_checkpoint(directory: Path) -> tuple[Path, Path]:
    """A checkpoint in float32 for this project's engine, and the same as a GGUF file for llama.cpp.

    Greedy texts are ASCII: what a decoder makes of bytes that are no UTF-8 differs.
    """
    checkpoint = make_qwen3(directory / "checkpoint", seed=3, max_position_embeddings=CONTEXT)
    tokenizer = make_tokenizer()
    others = [index for index in range(len(tokenizer)) if not tokenizer.decode([index]).isascii()]

    def silence(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        head = tensors["lm_head.weight"].clone()
        head[others] = 0.0
        return tensors | {"lm_head.weight": head}

    edit_tensors(checkpoint, silence)
    return checkpoint, write_gguf(directory / "model.gguf", checkpoint)


class LlamaServer:
    """A server with two slots over the GGUF file ``model``; ``options`` are of its command line."""

    def __init__(self, model: Path, directory: Path, *options: str, slot_tokens: int = SLOT_TOKENS) -> None:
        program = llama_server_program()
        assert program is not None, "ask llama_server_program() first"
        self._port = free_port()
        # The keys and values in float32 as well: greedy texts are compared with float32's.
        command = [str(program), "--model", str(model), "--alias", MODEL, "--host", "127.0.0.1"]
        command += ["--port", str(self._port), "--parallel", str(SLOTS), "--ctx-size", str(SLOTS * slot_tokens)]
        command += ["--threads", "1", "--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32", *options]
        self._process = LocalProcess("llama-server", command, directory / "llama-server.log")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> None:
        """Start the process, at the same port as before; it answers 503 until the model is loaded."""
        self._process.start()

    async def ready(self) -> None:
        """Return once it serves."""
        await eventually(lambda: self._status("/health") == 200 or not self._process.is_running)
        assert self._process.is_running, self._process.tail(30)

    def kill(self) -> None:
        self._process.kill()

    def slots(self) -> Sequence[dict[str, Any]]:
        """What it says of each slot: whether it is at work, and the parameters of its last request."""
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/slots", timeout=30) as answer:
            slots: list[dict[str, Any]] = json.load(answer)
        return slots

    @property
    def busy_slots(self) -> int:
        return sum(slot["is_processing"] for slot in self.slots())

    def _status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.url.removesuffix("/v1") + path, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0
