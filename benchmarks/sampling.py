"""What sampling costs a step beside the same rows taken greedily, by kind of request; by turns, medians.

Needs no checkpoint: random logits of 32 rows over 151,936 tokens (Qwen's vocabulary). Writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.output import add_output, write_text
from nanovllm import SamplingParams
from nanovllm.engine.sampling.sampler import Sampler
from nanovllm.engine.scheduling.sequence import Sequence

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7, "seed": 1},
    "temperature, top_p, top_k (Qwen's)": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": 1},
    "temperature, top_p": {"temperature": 0.7, "top_p": 0.8, "seed": 1},
    "temperature, min_p": {"temperature": 0.7, "min_p": 0.05, "seed": 1},
    "repetition penalty": {"temperature": 0.0, "repetition_penalty": 1.1},
}
SPREAD = 4.0  # standard deviation of the logits


def measure(rows: int, vocab: int, context: int, turns: int) -> dict[str, list[float]]:
    """Milliseconds of each turn, by case, after a turn that does not count."""
    logits = SPREAD * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(torch.device("cpu"), 0)
    batches = {
        name: [Sequence(f"{row}", list(range(context)), context, SamplingParams(**options), 64) for row in range(rows)]
        for name, options in CASES.items()
    }
    found: dict[str, list[float]] = {name: [] for name in CASES}
    for turn in range(turns + 1):
        for name, sequences in batches.items():
            own = logits.clone()
            start = time.perf_counter()
            sampler.sample(own, sequences)
            if turn:
                found[name].append(1e3 * (time.perf_counter() - start))
    return found


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--context", type=int, default=32_768, help="tokens of each sequence, which penalties count")
    parser.add_argument("--turns", type=int, default=9)
    add_output(parser, "sampling.json")
    args = parser.parse_args()
    machine = describe_machine(" ".join(["python -m benchmarks.sampling", *sys.argv[1:]]))
    found = measure(args.rows, args.vocab, args.context, args.turns)
    greedy = statistics.median(found["greedy"])
    results = {
        name: {"ms": round(statistics.median(turns), 2), "times_greedy": round(statistics.median(turns) / greedy, 2)}
        for name, turns in found.items()
    }
    for name, result in results.items():
        print(f"{name:36} {result['ms']:8.2f} ms {result['times_greedy']:6.2f} x greedy")
    shape = {"rows": args.rows, "vocab": args.vocab, "context": args.context, "turns": args.turns}
    write_text(args.output, json.dumps({"machine": machine, **shape, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
