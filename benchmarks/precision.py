"""What reduced precision costs in accuracy: bfloat16, int8 and a bfloat16 KV cache against float32, in this engine.

On SmolLM2-135M-Instruct and this project's own English (its documentation): perplexity, the error of a token's log
probability, and at how many places the most probable token is the one of float32 after the same text. On the shipped
checkpoint: held-out samples read exactly right. Writes a JSON file (``--output``).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.output import add_output, write_text
from benchmarks.smollm import smollm
from nanovllm import LLM, SamplingParams
from nanovllm.training import synthetic
from nanovllm.training.evaluate import EVALUATION_SEED

ROOT = Path(__file__).resolve().parent.parent
MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32, bfloat16 KV": {"kv_cache_dtype": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int8, bfloat16 KV": {"quantization": "int8", "kv_cache_dtype": "bfloat16"},
}
TEXTS = ("README.md", "ARCHITECTURE.md", "docs/guide.md", "docs/delivery.md", "docs/security.md")
WINDOW = 512  # tokens of a text that are scored together


def windows(engine: LLM, count: int) -> list[list[int]]:
    """The documentation, cut into windows of tokens."""
    tokens = engine.tokenizer.encode("\n\n".join((ROOT / name).read_text() for name in TEXTS))
    return [tokens[start : start + WINDOW] for start in range(0, len(tokens) - WINDOW, WINDOW)][:count]


def score(mode: str, count: int) -> tuple[list[float], list[int]]:
    """The log probability of every token of the windows, and the most probable token at its place."""
    logprobs, best = [], []
    with LLM(str(smollm()), max_model_len=WINDOW + 8, **MODES[mode]) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        for window in windows(engine, count):
            output = engine.generate([window], params, use_tqdm=False)[0]
            assert output.prompt_logprobs is not None
            for token, entry in zip(window[1:], output.prompt_logprobs[1:], strict=True):
                logprobs.append(entry[token].logprob)
                best.append(max(entry, key=lambda one: entry[one].logprob))
    return logprobs, best


def read(mode: str, count: int) -> dict[str, float]:
    """The share of held-out samples that the shipped checkpoint answers exactly right, by kind of answer."""
    samples = [synthetic.sample(index, seed=EVALUATION_SEED, split="heldout") for index in range(count)]
    with LLM("tiny-receipts", **MODES[mode]) as engine:
        outputs = engine.generate(
            [one.prompt for one in samples],
            SamplingParams(temperature=0.0, max_tokens=160),
            images=[one.images for one in samples],
            use_tqdm=False,
        )
    marks: dict[str, list[bool]] = defaultdict(list)
    for one, output in zip(samples, outputs, strict=True):
        marks[one.kind].append(output.text == one.answer)
        marks["all"].append(output.text == one.answer)
    return {kind: sum(right) / len(right) for kind, right in sorted(marks.items())}


def main() -> None:
    """Measure every mode and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=24, help=f"texts of {WINDOW} tokens")
    parser.add_argument("--samples", type=int, default=500, help="held-out samples for the shipped checkpoint")
    add_output(parser, "precision.json")
    arguments = parser.parse_args()
    exact, exact_best = score("float32", arguments.windows)
    modes = {}
    for mode in MODES:
        logprobs, best = (exact, exact_best) if mode == "float32" else score(mode, arguments.windows)
        errors = [abs(one - two) for one, two in zip(logprobs, exact, strict=True)]
        modes[mode] = {
            "tokens": len(logprobs),
            "perplexity": math.exp(-sum(logprobs) / len(logprobs)),
            "mean_logprob_error": sum(errors) / len(errors),
            "p99_logprob_error": sorted(errors)[int(0.99 * len(errors))],
            "same_best_token": sum(one == two for one, two in zip(best, exact_best, strict=True)) / len(best),
            "tiny_receipts_exact": read(mode, arguments.samples),
        }
        figures = modes[mode]
        print(
            f"{mode:22} perplexity {figures['perplexity']:.3f}, log probability off by "
            f"{figures['mean_logprob_error']:.4f} (p99 {figures['p99_logprob_error']:.3f}), same best token "
            f"{figures['same_best_token']:.2%}, tiny-receipts {figures['tiny_receipts_exact']['all']:.1%}",
            flush=True,
        )
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, VNNI {torch.cpu._is_vnni_supported()}"
    command = f"python -m benchmarks.precision --windows {arguments.windows} --samples {arguments.samples}"
    figures = {"command": command, "machine": machine, "torch": torch.__version__, "modes": modes}
    write_text(arguments.output, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
