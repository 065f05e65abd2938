"""What the parts share: checkpoints of random weights, engines of them, and the same weights in transformers."""

from __future__ import annotations

import gc
import random
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import Qwen3ForCausalLM

from benchmarks.checkpoints import SHAPES, Shape, checkpoint
from gpu_parts.report import Report
from gpu_parts.scale import Scale
from nanovllm import LLM
from nanovllm.engine.diagnostics import describe
from nanovllm.engine.outputs import RequestOutput

Finding = dict[str, Any]
"""A check, which has ``name`` and ``passed``, or figures."""
Answer = TypeVar("Answer")
_ALLOWED_BYTES = 256 << 20  # workspaces of cuBLAS, which torch keeps


@dataclass(frozen=True)
class Bench:
    """What is asked of which checkpoint on which device; ``report`` holds what earlier parts found."""

    scale: Scale
    shape_name: str
    device: str
    directory: Path  # of the checkpoints
    report: Report
    options: Mapping[str, Any]  # of every engine, as the command line says
    left_bytes: list[int] = field(default_factory=list)  # on the GPU, of each engine that was closed

    @property
    def shape(self) -> Shape:
        """Of the random weights."""
        return SHAPES[self.shape_name]

    @property
    def is_cuda(self) -> bool:
        """Whether this is the real thing."""
        return self.device == "cuda"

    @property
    def dtype(self) -> str:
        """Of the figures."""
        return "bfloat16" if self.is_cuda else "float32"

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return getattr(torch, self.dtype).itemsize

    @property
    def text(self) -> Path:
        """The checkpoint of random weights, made when it is first wanted."""
        return checkpoint(self.shape_name, self.directory)

    def ask(self, ask: Callable[[LLM], Answer], model: Path | str | None = None, **options: Any) -> Answer:
        """What ``ask`` finds with an engine, whose memory is free again afterwards, also when it fails."""
        before = allocated()
        engine = LLM(str(model or self.text), device=self.device, **{**options, **self.scale.options, **self.options})
        try:
            return ask(engine)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold the engine
            raise
        finally:
            engine.close()
            del engine
            free_memory()
            self.left_bytes.append(allocated() - before)

    def memory(self) -> Iterator[Finding]:
        """Whether closed engines gave back what they had: the next one would get less."""
        if self.is_cuda and self.left_bytes:
            passed = max(self.left_bytes) <= _ALLOWED_BYTES
            told = f"at most {max(self.left_bytes) >> 20} MiB left by {len(self.left_bytes)} engines"
            yield {"name": "memory is free again", "passed": passed, "told": told}

    def transformers(self, dtype: str) -> Any:
        """The same weights in transformers."""
        return Qwen3ForCausalLM.from_pretrained(self.text, dtype=getattr(torch, dtype)).to(self.device).eval()

    def draw(self, count: int, tokens: int, seed: int, more: int = 0) -> list[list[int]]:
        """Random prompts of ``tokens`` tokens, each with ``more`` than the one before it."""
        draw = random.Random(seed)
        return [
            [draw.randrange(2, self.shape.vocab_size) for _ in range(tokens + more * place)] for place in range(count)
        ]


def guarded(name: str, find: Callable[[], Finding]) -> Finding:
    """What ``find`` finds, or a failed check: the others go on."""
    try:
        return find()
    except Exception as error:
        traceback.print_exception(error)
        traceback.clear_frames(error.__traceback__)
        return {"name": name, "passed": False, "error": f"{type(error).__name__}: {error}"}


def path_of(engine: LLM, outputs: list[RequestOutput]) -> dict[str, Any]:
    """Which way an engine took, so that no check passes by way of another one."""
    graphs = engine.model_runner.graphs
    told = {finding.subject: f"{finding.value} ({finding.note})" for finding in describe(engine)}
    return {
        "attention": told["attention"],
        "cuda_graphs": told["CUDA graphs"],
        "graph_replays": graphs.num_replays if graphs else 0,
        "steps": engine.stats().steps,
        "cached_tokens": sum(output.usage.cached_tokens for output in outputs),
    }


def allocated() -> int:
    """Bytes that tensors take on the GPU."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def free_memory() -> None:
    """Give the GPU's memory back, so that the next one finds all of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
