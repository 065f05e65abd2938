"""Decoding with a step's own threads beside decoding with OpenMP's, alone and beside a process that is always busy.

Both sides run in one engine by turns of a few steps, so that what else the machine does falls on both. The neighbour
never waits, and has the same priority; what it loses to a side is CPU time. Writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # as the worker does, before torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from checkpoints import checkpoint
from machine import busy_seconds, describe_machine
from output import add_output, write_text

from nanovllm import LLM, SamplingParams
from nanovllm.engine.kernels import step_threads

SIDES: dict[str, Callable[[], AbstractContextManager[None]]] = {"openmp": nullcontext, "own": step_threads.awake}
FORMS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantization": "int8"},
}


@contextmanager
def neighbour() -> Iterator[Callable[[], float]]:
    """A process that never waits; yields how many seconds of CPU it has had."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield lambda: int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[0]) / 1e9
    finally:
        process.kill()
        process.wait()


def turns(engine: LLM, seconds: float, turn_s: float, cpu_of_neighbour: Callable[[], float]) -> dict[str, Any]:
    """Medians over turns of each side: milliseconds of a step, and the neighbour's share of a core."""
    awake = step_threads.awake
    steps: dict[str, list[float]] = {side: [] for side in SIDES}
    shares: dict[str, list[float]] = {side: [] for side in SIDES}
    until = time.perf_counter() + seconds
    try:
        while time.perf_counter() < until:
            for side, context in SIDES.items():
                step_threads.awake = context  # type: ignore[assignment]
                engine.step()
                count, began, cpu = 0, time.perf_counter(), cpu_of_neighbour()
                while (took := time.perf_counter() - began) < turn_s:
                    engine.step()
                    count += 1
                steps[side].append(1e3 * took / count)
                shares[side].append((cpu_of_neighbour() - cpu) / took)
    finally:
        step_threads.awake = awake
    return {
        side: {
            "step_ms": round(statistics.median(steps[side]), 3),
            "neighbour": round(statistics.mean(shares[side]), 3),
            "turns": len(steps[side]),
        }
        for side in SIDES
    }


def measure(directory: Path, form: str, rows: list[int], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The figures of each number of rows, alone and beside the neighbour; ``others`` is what else had of the cores."""
    draw = random.Random(0)
    longest = args.prompt + args.most_steps
    with LLM(
        str(directory), max_num_seqs=max(rows), max_model_len=longest, num_speculative_tokens=0, **FORMS[form]
    ) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=args.most_steps, ignore_eos=True)
        for count in rows:
            prompts = [[draw.randrange(2, 500) for _ in range(args.prompt)] for _ in range(count)]
            names = [engine.add_request(prompt, params) for prompt in prompts]
            while engine.scheduler.waiting or any(one.num_output_tokens < 4 for one in engine.scheduler.running):
                engine.step()
            began, others = time.perf_counter(), busy_seconds() - time.process_time()
            alone = turns(engine, args.seconds, args.turn, lambda: 0.0)
            others = busy_seconds() - time.process_time() - others
            load = round(others / (time.perf_counter() - began), 3)
            beside = {}
            if args.beside:
                with neighbour() as cpu:
                    time.sleep(0.2)
                    beside = turns(engine, args.beside, args.turn, cpu)
            for name in names:
                engine.abort(name)
            while engine.has_unfinished():
                engine.step()
            yield {"form": form, "rows": count, "others": load, "alone": alone, "beside": beside}


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm", help="smollm, or a shape of benchmarks/checkpoints.py")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each case alone")
    parser.add_argument("--beside", type=float, default=6.0, help="seconds of each case beside the neighbour; 0: none")
    parser.add_argument("--turn", type=float, default=0.25, help="seconds of a side's turn")
    parser.add_argument("--most-steps", type=int, default=8000)
    add_output(parser, "threads.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = describe_machine(" ".join(["python benchmarks/threads.py", *sys.argv[1:]]))
    results = []
    with tempfile.TemporaryDirectory() as root:
        directory = checkpoint(args.model, Path(root))
        for form in args.forms:
            for result in measure(directory, form, args.rows, args):
                results.append(result)
                print_case(result)
    result = {"machine": machine, "model": args.model, "threads": args.threads, "results": results}
    write_text(args.output, json.dumps(result, indent=1) + "\n")


def print_case(case: dict[str, Any]) -> None:
    """One line for people."""
    line = f"{case['form']:9} {case['rows']:3} rows, others {case['others']:.2f}"
    for name in ("alone", "beside"):
        if sides := case[name]:
            old, new = sides["openmp"], sides["own"]
            line += (
                f"  {name}: {old['step_ms']:8.3f} ms, {new['step_ms']:8.3f} ({old['step_ms'] / new['step_ms']:.2f}x)"
            )
            line += f" neighbour {old['neighbour']:.3f}, {new['neighbour']:.3f}" if new["neighbour"] else ""
    print(line, flush=True)


if __name__ == "__main__":
    main()
