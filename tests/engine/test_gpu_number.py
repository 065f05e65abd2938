"""An engine on one GPU of several touches that one alone: recorded calls of torch.cuda, and the package's own text."""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nanovllm
from nanovllm.engine.backends.base import Request
from nanovllm.engine.backends.native import AsyncEngine
from nanovllm.engine.execution import loading
from nanovllm.engine.execution.cuda_graphs import CudaRecorder
from nanovllm.engine.execution.model_runner import ModelRunner
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.sampling_params import SamplingParams


class FakeCuda:
    """torch.cuda's surface that recording uses, which notes the current device of each call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        self.calls: list[tuple[str, int]] = []
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("Stream", "current_stream", "graph_pool_handle", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, partial(self.call, name))
        monkeypatch.setattr(torch.cuda, "set_device", self.set_device)

    def call(self, name: str, *_: Any) -> Any:
        self.calls.append((name, self.current))
        return self

    def set_device(self, device: torch.device) -> None:
        assert device.index is not None
        self.current = device.index

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before = self.current
        self.set_device(device)
        yield
        self.current = before

    @contextmanager
    def stream(self, _: Any) -> Iterator[None]:
        yield

    @contextmanager
    def graph(self, *_: Any, **__: Any) -> Iterator[None]:
        self.call("synchronize")  # as torch does
        yield
        self.call("end of capture")

    def wait_stream(self, _: Any) -> None:
        self.call("wait_stream")

    def synchronize(self) -> None:
        self.call("stream.synchronize")

    def replay(self) -> None:
        self.call("replay")


def test_recording_for_the_second_gpu_leaves_the_first_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    record = CudaRecorder(torch.device("cuda", 1))
    cuda.calls.clear()  # a stream is made for the device that it is given, and a handle of a pool is a number
    record(lambda: cuda.call("compute"))
    assert [device for _, device in cuda.calls] == [1] * len(cuda.calls)
    assert [name for name, _ in cuda.calls].count("compute") == 2
    assert ("synchronize", 1) in cuda.calls
    assert cuda.current == 0  # the caller's own


def test_an_engine_s_thread_computes_on_the_engine_s_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    ModelRunner.use_in_this_thread(SimpleNamespace(device=torch.device("cuda", 1)))  # type: ignore[arg-type]
    assert cuda.current == 1


async def test_the_engine_s_thread_takes_its_gpu_before_its_first_step(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, int]] = []
    with LLMEngine(str(text), kv_cache_bytes=1 << 20) as llm:

        def note(runner: ModelRunner) -> None:
            called.append((threading.current_thread().name, llm.stats().steps))

        monkeypatch.setattr(ModelRunner, "use_in_this_thread", note)
        async with AsyncEngine(llm) as engine:
            assert (await engine.submit(Request("a", "hello", sampling=SamplingParams(max_tokens=2)))).text
    assert called == [("nanovllm-engine", 0)]


def test_a_gpu_without_a_number_is_the_current_one_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert loading.numbered(torch.device("cuda")) == torch.device("cuda", 1)
    assert loading.numbered(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert loading.numbered(torch.device("cpu")) == torch.device("cpu")


def package_trees(word: str) -> Iterator[tuple[str, ast.Module]]:
    """Every file of the package that has ``word`` in it."""
    for path in sorted(Path(nanovllm.__file__).parent.rglob("*.py")):
        if word in (source := path.read_text()):
            yield path.name, ast.parse(source)


def test_every_launch_of_a_triton_kernel_is_on_its_tensors_device() -> None:
    """torch's operators take their tensors' device; Triton takes the thread's current one."""
    trees = dict(package_trees("import triton"))
    nodes = [(name, node) for name, tree in trees.items() for node in ast.walk(tree)]
    functions = [(name, node) for name, node in nodes if isinstance(node, ast.FunctionDef)]
    kernels = {
        node.name for _, node in functions if any("triton.jit" in ast.unparse(one) for one in node.decorator_list)
    }
    guarded = {
        inner
        for _, node in nodes
        if isinstance(node, ast.With) and any("torch.cuda.device_of(" in ast.unparse(item) for item in node.items)
        for inner in ast.walk(node)
    }
    launches = [
        (name, node)
        for name, node in nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and ast.unparse(node.func.value) in kernels
    ]
    assert launches

    def is_called_guarded(function: str) -> bool:
        calls = [node for _, node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == function]
        return bool(calls) and all(call in guarded for call in calls)

    helpers = {inner for _, node in functions if is_called_guarded(node.name) for inner in ast.walk(node)}
    assert [(name, node.lineno) for name, node in launches if node not in guarded | helpers] == []


def test_every_call_of_torch_cuda_names_its_device() -> None:
    """Without an argument these mean the thread's current device, and some make a context there."""
    of_a_device = {
        *("Stream", "current_stream", "default_stream", "synchronize", "get_device_name", "get_device_properties"),
        *("get_device_capability", "mem_get_info", "memory_allocated", "max_memory_allocated", "memory_reserved"),
        *("max_memory_reserved", "reset_peak_memory_stats"),
    }
    calls = [
        (name, node.lineno, ast.unparse(node))
        for name, tree in package_trees("torch.cuda.")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("torch.cuda.") in of_a_device
    ]
    assert calls
    assert [call for call in calls if call[-1].endswith("()")] == []
