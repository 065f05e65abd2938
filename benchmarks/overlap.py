"""How busy overlap keeps a device: a clock takes its place, for which a step takes a given multiple of the host's step.

The device computes nothing: a launch returns at once, a step begins when the one before has ended and takes its time,
and reading a step's tokens waits for that end. The host does all of its own work: schedule, prepare, launch, sample,
commit with text. The clock is the CPU time of the engine's thread and what it has waited, so that other work on the
machine, which would stop the host for longer than a step, is not in it. By turns with overlap and without. Writes a
JSON file.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from host_step import PROMPT_TOKENS, make_checkpoint, make_engine
from torch import Tensor

from benchmarks.machine import describe_machine
from benchmarks.output import add_output, write_text
from nanovllm import SamplingParams
from nanovllm.engine import llm_engine
from nanovllm.engine.execution import launched_step
from nanovllm.engine.layers.device_copy import HostCopy


class ClockedDevice:
    """A device that is busy for ``step_s`` seconds after each launch, and idle from a step's end to the next launch."""

    def __init__(self) -> None:
        self.step_s = 0.0
        self.idle_s = 0.0
        self.free_at = 0.0
        self._waited_s = 0.0

    def now(self) -> float:
        """Seconds that the host has worked or waited."""
        return time.thread_time() + self._waited_s

    def wait_until(self, moment: float) -> None:
        """Let the clock go on to ``moment``, unless it is past."""
        self._waited_s += max(0.0, moment - self.now())

    def record(self, compute: Callable[[], Any]) -> Callable[[], None]:
        """A recorder of steps, each of which is one launch."""
        compute()
        return self.launch

    def launch(self) -> None:
        """Queue a step behind those that were launched before."""
        now = self.now()
        self.idle_s += max(0.0, now - self.free_at)
        self.free_at = max(now, self.free_at) + self.step_s

    def copy(self, tensors: list[Tensor]) -> HostCopy:
        """Copies that are there when what has been launched is done."""
        return _ClockedCopy(tensors, self)


class _ClockedCopy(HostCopy):
    def __init__(self, tensors: list[Tensor], device: ClockedDevice) -> None:
        super().__init__(tensors)
        self._device, self._done_at = device, device.free_at

    def wait(self) -> list[Tensor]:
        self._device.wait_until(self._done_at)
        return super().wait()


def measure(directory: Path, rows: int, steps: int, step_s: float, *, overlaps: bool) -> tuple[float, float]:
    """The median seconds of a step on the host's clock, and the share of time that the device was busy."""
    device, draw = ClockedDevice(), random.Random(0)
    llm_engine.is_asynchronous = lambda _: overlaps
    launched_step.HostCopy = device.copy
    with make_engine(directory, 256, record=device.record) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=steps + 40, ignore_eos=True)
        for _ in range(rows):
            engine.add_request([draw.randrange(2, 500) for _ in range(PROMPT_TOKENS)], params)
        while engine.scheduler.waiting or any(one.num_output_tokens < 4 for one in engine.scheduler.running):
            engine.step()
        graphs = engine.model_runner.graphs
        assert graphs is not None
        with torch.inference_mode():
            graphs._logits.copy_(torch.randn(graphs._logits.shape, generator=torch.Generator().manual_seed(0)))
        gc.collect()
        gc.freeze()  # as the worker does: engines of earlier turns are not looked through again
        device.step_s = step_s
        for _ in range(4):
            engine.step()
        device.idle_s, began, seconds = 0.0, device.now(), []
        for _ in range(steps):
            start = device.now()
            engine.step()
            seconds.append(device.now() - start)
        gc.unfreeze()
        return statistics.median(seconds), 1.0 - device.idle_s / (device.now() - began)


def main() -> None:
    """Measure, print, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--factor", type=float, default=2.0, help="the device's step beside the host's")
    parser.add_argument("--steps", type=int, default=500, help="that count, of each turn")
    parser.add_argument("--turns", type=int, default=3)
    add_output(parser, "overlap.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine(" ".join(["python benchmarks/overlap.py", *sys.argv[1:]]))
    turns = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_checkpoint(directory)
        for _ in range(args.turns):
            host_s, _ = measure(directory, args.rows, args.steps, 0.0, overlaps=False)
            device_s = args.factor * host_s
            turn = {"host_step_ms": round(1e3 * host_s, 3), "device_step_ms": round(1e3 * device_s, 3)}
            for overlaps, label in ((True, "overlapped"), (False, "waiting")):
                step_s, busy = measure(directory, args.rows, args.steps, device_s, overlaps=overlaps)
                turn |= {f"{label}_step_ms": round(1e3 * step_s, 3), f"{label}_busy": round(busy, 4)}
            turns.append(turn)
            print(*(f"{key}: {value}" for key, value in turn.items()), sep="  ", flush=True)
    medians = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    print("median", *(f"{key}: {value}" for key, value in medians.items()), sep="  ")
    result = {"machine": machine, "rows": args.rows, "factor": args.factor, "steps": args.steps}
    write_text(args.output, json.dumps(result | {"medians": medians, "turns": turns}, indent=1) + "\n")


if __name__ == "__main__":
    main()
