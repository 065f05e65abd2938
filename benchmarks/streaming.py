"""What an event loop that delivers streams adds to the engine's step, by the interpreter's switch interval.

The engine is a real one beside a real event loop; its device is none: a recorded step sleeps for so many milliseconds
without the interpreter's lock, as a host does that waits for a GPU. Cases take turns; medians. Writes a JSON file.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import selectors
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.checkpoints import SHAPES, make_text_checkpoint
from benchmarks.machine import describe_machine
from benchmarks.output import add_output, write_text
from nanovllm import LLM, SamplingParams
from nanovllm.engine.attention.varlen import PagedVarlenAttention
from nanovllm.engine.backends.base import Generation, Request
from nanovllm.engine.backends.native import AsyncEngine
from nanovllm.engine.execution import model_runner
from nanovllm.engine.outputs import StepOutput, TokenChunk
from nanovllm.pipeline.operations.yielding_loop import YieldingSelector

INTERVALS_MS = (5.0, 1.0, 0.5, 0.1)  # 5: the interpreter's own
YIELDING_MS = (5.0, 0.1)  # of them, with the worker's event loop too
WARM_STEPS = 10
MAX_TURN_S = 3.0
PROMPT = "w2 w3 w5 w7 w11 w13 w17 w19"
DOCUMENT = json.dumps([{"id": index, "text": f"line {index}", "box": [index] * 4} for index in range(200)])


class Selector(YieldingSelector):
    """The worker's selector, or the interpreter's own."""

    yields = False

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As either."""
        return super().select(timeout) if self.yields else selectors.DefaultSelector.select(self, timeout)


class Device:
    """A device that computes nothing for ``step_ms``."""

    def __init__(self) -> None:
        self.step_ms = 0.0

    def replay(self) -> None:
        """Wait as for a step."""
        if self.step_ms:
            time.sleep(self.step_ms / 1e3)


def make_engine(directory: Path, device: Device, rows: int) -> LLM:
    """An engine whose steps of single tokens are recorded on ``device``; its logits are noise."""
    attention = PagedVarlenAttention(torch.device("cpu"), lambda query, *_: torch.zeros_like(query))
    with (
        patch.object(model_runner, "choose_recorder", lambda _: lambda _: device.replay),
        patch.object(model_runner, "choose_backend", lambda *_: attention),
    ):
        engine = LLM(
            str(directory),
            device="cpu",
            max_num_seqs=rows,
            max_num_batched_tokens=16 * rows,
            kv_cache_bytes=256 << 20,
            num_speculative_tokens=0,
        )
    assert engine.model_runner.graphs is not None
    with torch.inference_mode():
        engine.model_runner.graphs._logits.normal_()
    return engine


@dataclass
class Turn:
    """One case's turn: what its steps took, and what passed between the threads meanwhile."""

    starts: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    chunks: int = 0
    handovers: int = 0
    callbacks: int = 0
    gc_s: float = 0.0
    gc_runs: int = 0


class Meter:
    """``engine.step`` with a clock: measures ``steps`` of them once every one of ``rows`` requests has its seat."""

    def __init__(self, engine: LLM, device: Device, rows: int, steps: int) -> None:
        self.rows, self.steps = rows, steps
        self._device, self._step = device, engine.step
        engine.step = self.step  # type: ignore[method-assign]
        self.begin(0.0, is_alone=True)

    def begin(self, device_ms: float, *, is_alone: bool) -> None:
        """The next turn. ``is_alone``: the event loop gets no outputs of the steps that count."""
        self.turn = Turn()
        self.seated, self.finished = asyncio.Event(), asyncio.Event()
        self._device_ms, self._is_alone = device_ms, is_alone
        self._device.step_ms = 0.0
        self._first_step: dict[str, int] = {}
        self._returned: list[float] = []
        self._warm, self._is_over = WARM_STEPS, False
        self._loop: asyncio.AbstractEventLoop | None = None

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Tell ``loop`` when the requests have their seats, and when the turn is over."""
        self._loop = loop

    def end(self, since: float) -> None:
        """End the turn, which began at ``since``; a step that is not over counts with what it has lasted."""
        if self.is_counting:
            self.turn.starts = [*(self.turn.starts or [since]), time.perf_counter()]
        self._is_over = True
        self._device.step_ms = 0.0

    @property
    def is_counting(self) -> bool:
        """Whether steps of this turn are measured now."""
        return not self._warm and not self._is_over and len(self.turn.starts) <= self.steps

    def step(self) -> list[StepOutput]:
        """In the engine's thread."""
        if self.is_counting:
            self.turn.starts.append(time.perf_counter())
            if len(self.turn.starts) > self.steps:
                self._device.step_ms = 0.0
                self._tell(self.finished)
        started = time.thread_time()
        outputs = self._step()
        if self.is_counting:
            self.turn.cpu_s.append(time.thread_time() - started)
        if len(self._first_step) < self.rows:
            for output in outputs:
                self._first_step.setdefault(output.request_id, len(self._returned))
        elif self._warm:
            self._device.step_ms = self._device_ms
            self._warm -= 1
            if not self._warm:
                self._tell(self.seated)
        self._returned.append(time.perf_counter())
        return [] if self._is_alone and self.is_counting else outputs

    def _tell(self, event: asyncio.Event) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(event.set)

    def saw(self, request_id: str, num_tokens: int) -> None:
        """In the loop: a consumer has a chunk whose last token is the request's so-manieth."""
        if self.is_counting:
            made = self._first_step[request_id] + num_tokens - 1
            self.turn.chunks += 1
            self.turn.latencies_s.append(time.perf_counter() - self._returned[made])


def event_of(request_id: str, chunk: TokenChunk) -> bytes:
    """A chunk as a server of OpenAI's protocol sends it."""
    choice = {"index": chunk.index, "delta": {"content": chunk.text}, "finish_reason": chunk.finish_reason}
    body = {"id": request_id, "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


async def stream(generation: Generation, meter: Meter) -> None:
    """A consumer that sends every chunk."""
    tokens = 0
    async for chunk in generation:
        event_of(generation.request_id, chunk)
        tokens += len(chunk.token_ids)
        meter.saw(generation.request_id, tokens)


async def result(generation: Generation, _: Meter) -> None:
    """A consumer that publishes the whole output, as the worker's jobs do."""
    json.dumps(await generation)


async def parse(pause_s: float) -> None:
    """Other work of a loop: a millisecond of small callbacks, then a pause."""
    while True:
        until = time.perf_counter() + 1e-3
        while time.perf_counter() < until:
            json.loads(DOCUMENT)
            await asyncio.sleep(0)
        await asyncio.sleep(pause_s)


@contextmanager
def counted(loop: asyncio.AbstractEventLoop, meter: Meter) -> Iterator[None]:
    """Count into the turn what the engine's thread hands over, what the loop runs, and what the collector takes."""

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted_call(*args: Any, **kwargs: Any) -> Any:
            if meter.is_counting:
                setattr(meter.turn, name, getattr(meter.turn, name) + 1)
            return call(*args, **kwargs)

        return counted_call

    since = 0.0

    def collected(phase: str, _: dict[str, int]) -> None:
        nonlocal since
        if phase == "start":
            since = time.perf_counter()
        elif meter.is_counting:
            meter.turn.gc_s += time.perf_counter() - since
            meter.turn.gc_runs += 1

    originals = loop.call_soon, loop.call_soon_threadsafe
    loop.call_soon = counting("callbacks", loop.call_soon)  # type: ignore[method-assign]
    loop.call_soon_threadsafe = counting("handovers", loop.call_soon_threadsafe)  # type: ignore[method-assign]
    gc.callbacks.append(collected)
    try:
        yield
    finally:
        gc.callbacks.remove(collected)
        loop.call_soon, loop.call_soon_threadsafe = originals  # type: ignore[method-assign]


CONSUMERS: dict[str, Callable[[Generation, Meter], Any]] = {
    "idle": result,
    "results": result,
    "streams": stream,
    "streams, work": stream,
    "streams, busy": stream,
}
"""What the event loop does beside the steps: nothing, results at their end, streams, streams and other work with pauses
or without."""
PAUSES_S = {"streams, work": 1e-3, "streams, busy": 0.0}


async def take_turn(engine: AsyncEngine, meter: Meter, loop_work: str, device_ms: float, interval_ms: float) -> Turn:
    """One turn of a case."""
    loop = asyncio.get_running_loop()
    meter.begin(device_ms, is_alone=loop_work == "idle")
    meter.watch(loop)
    sampling = SamplingParams(temperature=0.0, max_tokens=2_000, ignore_eos=True)
    sys.setswitchinterval(interval_ms / 1e3)
    generations = [
        engine.submit(Request(f"r{row}", prompt=PROMPT, sampling=sampling, raw_prompt=True))
        for row in range(meter.rows)
    ]
    consumers = [asyncio.create_task(CONSUMERS[loop_work](generation, meter)) for generation in generations]
    await meter.seated.wait()
    since = time.perf_counter()
    other = asyncio.create_task(parse(PAUSES_S[loop_work])) if loop_work in PAUSES_S else None
    with counted(loop, meter), suppress(TimeoutError):
        await asyncio.wait_for(meter.finished.wait(), MAX_TURN_S)
    if other is not None:
        other.cancel()
    meter.end(since)
    for generation in generations:
        generation.abort()
    await asyncio.gather(*consumers)
    return meter.turn


async def measure(
    directory: Path, selector: Selector, rows: int, steps: int, turns: int, devices_ms: list[float]
) -> dict[Any, list[Turn]]:
    """The turns of every case, by device, what the loop does, switch interval, and loop; after one that is left out."""
    device = Device()
    inner = make_engine(directory, device, rows)
    meter = Meter(inner, device, rows, steps)
    cases = [
        (device_ms, loop_work, interval_ms, yields)
        for device_ms in devices_ms
        for loop_work in CONSUMERS
        for interval_ms in (INTERVALS_MS if loop_work.startswith("streams") else INTERVALS_MS[:1])
        for yields in ((False, True) if loop_work.startswith("streams") and interval_ms in YIELDING_MS else (False,))
    ]
    found: dict[Any, list[Turn]] = {case: [] for case in cases}
    async with AsyncEngine(inner) as engine:
        gc.collect()
        gc.freeze()  # as the worker does
        for turn in range(turns + 1):
            for device_ms, loop_work, interval_ms, yields in cases:
                selector.yields = yields
                taken = await take_turn(engine, meter, loop_work, device_ms, interval_ms)
                if turn:
                    found[device_ms, loop_work, interval_ms, yields].append(taken)
    return found


def summary(turns: list[Turn], device_ms: float, rows: int) -> dict[str, float]:
    """Medians over the steps of all turns, and means of what passed between the threads."""
    steps_ms = [1e3 * (end - start) for turn in turns for start, end in zip(turn.starts, turn.starts[1:], strict=False)]
    cpu_ms = statistics.median([1e3 * cpu for turn in turns for cpu in turn.cpu_s] or [0.0])
    latencies_ms = sorted(1e3 * latency for turn in turns for latency in turn.latencies_s)
    count = len(steps_ms)
    median_ms = statistics.median(steps_ms)
    return {
        "steps": count,
        "step_ms": round(median_ms, 2),
        "step_mean_ms": round(statistics.mean(steps_ms), 2),
        "step_p95_ms": round(sorted(steps_ms)[int(0.95 * count)], 2),
        "step_cpu_ms": round(cpu_ms, 2),
        "waited_ms": round(median_ms - cpu_ms - device_ms, 2),
        "latency_ms": round(statistics.median(latencies_ms), 2) if latencies_ms else 0.0,
        "latency_p95_ms": round(latencies_ms[int(0.95 * len(latencies_ms))], 2) if latencies_ms else 0.0,
        "chunks_a_stream_and_step": round(sum(turn.chunks for turn in turns) / count / rows, 3),
        "handovers_a_step": round(sum(turn.handovers for turn in turns) / count, 3),
        "callbacks_a_step": round(sum(turn.callbacks for turn in turns) / count, 2),
        "gc_ms_a_step": round(1e3 * sum(turn.gc_s for turn in turns) / count, 3),
    }


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60, help="of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device-ms", type=float, nargs="+", default=[5.0, 10.0])
    add_output(parser, "streaming.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine(" ".join(["python -m benchmarks.streaming", *sys.argv[1:]]))
    with tempfile.TemporaryDirectory() as directory:
        make_text_checkpoint(Path(directory), SHAPES["tiny"])
        selector = Selector()
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
            found = runner.run(measure(Path(directory), selector, args.rows, args.steps, args.turns, args.device_ms))
    results = []
    for (device_ms, loop_work, interval_ms, yields), turns in found.items():
        case = {"device_ms": device_ms, "loop": loop_work, "switch_interval_ms": interval_ms, "loop_yields": yields}
        figures = summary(turns, device_ms, args.rows)
        if loop_work == "idle":
            idle_ms = figures["step_ms"]
        results.append({**case, **figures, "times_idle": round(figures["step_ms"] / idle_ms, 2)})
        print(
            f"device {device_ms:4g} ms  {loop_work:14} switch {interval_ms:4g} ms{', yields' * yields:8}: "
            f"step {figures['step_ms']:6.2f} ms (mean {figures['step_mean_ms']:6.2f}, "
            f"p95 {figures['step_p95_ms']:6.2f}, {results[-1]['times_idle']:.2f} x idle), "
            f"chunk after {figures['latency_ms']:6.2f} ms"
        )
    shape = {"rows": args.rows, "steps": args.steps, "turns": args.turns}
    write_text(args.output, json.dumps({"machine": machine, **shape, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
