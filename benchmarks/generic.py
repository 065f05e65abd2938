"""What a model of transformers' own layers costs beside the same model by hand: CPU time a token of decoding, by turns.

Both engines have the same weights, attention and linear layers; what differs is the code of a layer around them. Writes
a JSON file (``--output``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.checkpoints import SHAPES, make_text_checkpoint
from benchmarks.machine import describe_machine
from benchmarks.output import add_output, write_text
from nanovllm import LLM, SamplingParams

BACKENDS = ("native", "generic")


def cpu_ms_a_token(engine: LLM, rows: int, tokens: int) -> float:
    """Milliseconds of CPU time a generated token, of ``rows`` requests at once, after their prompts."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    for row in range(rows):
        engine.add_request([7 + row, 8, 9], params)
    engine.step()
    start = time.process_time()
    while engine.has_unfinished():
        engine.step()
    return 1e3 * (time.process_time() - start) / (rows * (tokens - 1))


def main() -> None:
    """Measure, print, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text-size", choices=SHAPES, default="medium")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7)
    add_output(parser, "generic.json")
    args = parser.parse_args()
    machine = describe_machine(" ".join(["python -m benchmarks.generic", *sys.argv[1:]]))
    found: dict[str, list[float]] = {name: [] for name in BACKENDS}
    with tempfile.TemporaryDirectory() as folder:
        make_text_checkpoint(Path(folder), SHAPES[args.text_size])
        engines = {
            name: LLM(folder, backend=name, kv_cache_bytes=64 << 20, num_speculative_tokens=0) for name in BACKENDS
        }
        for turn in range(args.turns + 2):
            for name in BACKENDS if turn % 2 else reversed(BACKENDS):
                milliseconds = cpu_ms_a_token(engines[name], args.rows, args.tokens)
                if turn >= 2:
                    found[name].append(milliseconds)
        for engine in engines.values():
            engine.close()
    medians = {name: round(statistics.median(turns), 3) for name, turns in found.items()}
    ratios = [generic / native for native, generic in zip(*found.values(), strict=True)]
    results = {"cpu_ms_a_token": medians, "ratio": round(statistics.median(ratios), 3), "turns": len(ratios)}
    print(results)
    shape = {"text_size": args.text_size, "rows": args.rows, "tokens": args.tokens}
    write_text(args.output, json.dumps({"machine": machine, **shape, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
