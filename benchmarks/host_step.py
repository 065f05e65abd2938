"""Host time of a decode step: the engine with recorded steps whose replay computes nothing, by turns beside nano-vllm.

All that is left is what Python does between two launches: schedule, prepare, launch, sample (an argmax over a
vocabulary of 512), commit with text. ``--nano-vllm`` names a checkout of github.com/GeeeekExplorer/nano-vllm, whose
steps neither detokenise nor check stop strings. CPU time of the thread, medians. Writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.checkpoints import Shape, make_text_checkpoint
from benchmarks.machine import describe_machine
from benchmarks.output import add_output, write_text
from nanovllm import LLM, SamplingParams
from nanovllm.engine.attention.varlen import PagedVarlenAttention
from nanovllm.engine.execution import model_runner
from nanovllm.engine.execution.cuda_graphs import Recorder

ROWS = (1, 32, 256)
PROMPT_TOKENS = 300
SHAPE = Shape(64, 2, 4, 2, 16, 128, 512)
NANO = Path(__file__).parent / "peers" / "nano_vllm_host.py"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"num_speculative_tokens": 0}),
    "stop string": ({"stop": ["zzz"]}, {"num_speculative_tokens": 0}),
    "drafts": ({}, {"num_speculative_tokens": 8}),
}
"""Sampling parameters and engine options."""


def make_checkpoint(directory: Path) -> None:
    """A tiny model whose tokens are words, as those of a byte-level vocabulary mostly are."""
    make_text_checkpoint(directory, SHAPE)
    words = ["".join(letters) for letters in product(ascii_lowercase, repeat=2)][: SHAPE.vocab_size - 1]
    vocab = {word: index for index, word in enumerate(["<eos>", *(f"Ġ{word}" for word in words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)


def replay_nothing(compute: Callable[[], Any]) -> Callable[[], Any]:
    """A recorder whose replays compute nothing."""
    compute()
    return lambda: None


def make_engine(directory: Path, block_size: int, record: Recorder = replay_nothing, **options: Any) -> LLM:
    """An engine whose steps are recorded, in the layout of pages that kernels for CUDA want."""

    def attend(query: Tensor, *_: Any) -> Tensor:
        return torch.zeros_like(query)

    attention = PagedVarlenAttention(torch.device("cpu"), attend, block_size)
    model_runner.choose_recorder = lambda _: record
    model_runner.choose_backend = lambda *_: attention
    return LLM(
        str(directory),
        device="cpu",
        kv_cache_bytes=256 << 20,
        max_num_seqs=512,
        max_num_batched_tokens=1 << 15,
        max_model_len=2048,
        **options,
    )


def time_parts(engine: LLM) -> dict[str, float]:
    """Seconds by part of a step, which the engine's calls add to from now on."""
    seconds: dict[str, float] = defaultdict(float)

    def watch(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return inner(*args, **kwargs)
            finally:
                seconds[name] += time.thread_time() - began

        setattr(owner, name, timed)

    watch(engine.scheduler, "schedule")
    watch(engine.model_runner, "prepare")
    watch(engine.model_runner, "forward")
    watch(engine.sampler, "sample")
    watch(engine, "commit")
    return seconds


def measure(directory: Path, rows: int, case: str, steps: int, block_size: int, *, split: bool) -> dict[str, Any]:
    """The median step in microseconds; with ``split`` its parts too, whose clocks cost some microseconds."""
    sampling, options = CASES[case]
    draw = random.Random(0)
    with make_engine(directory, block_size, **options) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=steps + 40, ignore_eos=True, **sampling)
        for _ in range(rows):
            engine.add_request([draw.randrange(2, 500) for _ in range(PROMPT_TOKENS)], params)
        while engine.scheduler.waiting or any(one.num_output_tokens < 4 for one in engine.scheduler.running):
            engine.step()
        graphs = engine.model_runner.graphs
        assert graphs is not None
        generator = torch.Generator().manual_seed(0)
        fresh = [torch.randn(graphs._logits.shape, generator=generator) for _ in range(7)]
        parts = time_parts(engine) if split else {}
        before, seconds = graphs.num_replays, []
        for step in range(steps):
            with torch.inference_mode():
                graphs._logits.copy_(fresh[step % len(fresh)])
            began = time.thread_time()
            engine.step()
            seconds.append(time.thread_time() - began)
        assert graphs.num_replays - before == steps, "a step was not replayed"
    result: dict[str, Any] = {"us": statistics.median(seconds) * 1e6}
    if split:
        result["parts_us"] = {name: round(total / steps * 1e6) for name, total in parts.items()}
    return result


def nano_vllm(checkout: Path, steps: int) -> dict[str, float]:
    """Microseconds of a step, by rows, in a process of its own: both packages have the same name."""
    command = [sys.executable, str(NANO), str(checkout), str(steps), *map(str, ROWS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=NANO.parent, env={"PYTHONPATH": ""})
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure, print a table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nano-vllm", type=Path, metavar="CHECKOUT")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120, help="that count, of each turn")
    parser.add_argument("--block-size", type=int, default=256, help="tokens of a page; nano-vllm's is 256")
    parser.add_argument("--split", action="store_true", help="time the parts of a step too")
    add_output(parser, "host-step.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    words = ["CHECKOUT" if word == str(args.nano_vllm) else word for word in sys.argv[1:]]
    machine = describe_machine(" ".join(["python benchmarks/host_step.py", *words]))
    turns: dict[tuple[str, int], list[float]] = defaultdict(list)
    parts: dict[tuple[str, int], dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoint(Path(directory))
        for _ in range(args.turns):
            if args.nano_vllm is not None:
                for number, us in nano_vllm(args.nano_vllm.resolve(), args.steps).items():
                    turns["nano-vllm", int(number)].append(us)
            for case in CASES:
                for rows in ROWS:
                    found = measure(Path(directory), rows, case, args.steps, args.block_size, split=args.split)
                    turns[case, rows].append(found["us"])
                    parts[case, rows] = found.get("parts_us", {})
    results = []
    for (case, rows), values in turns.items():
        result: dict[str, Any] = {"case": case, "rows": rows, "us": round(statistics.median(values), 1)}
        if theirs := turns.get(("nano-vllm", rows)):
            result["times_nano_vllm"] = round(result["us"] / statistics.median(theirs), 2)
        result["times_plain"] = round(result["us"] / statistics.median(turns["plain", rows]), 2)
        if found_parts := parts.get((case, rows)):
            result["parts_us"] = found_parts
        results.append(result)
        print(*(f"{name}: {value}" for name, value in result.items()), sep="  ")
    write_text(args.output, json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
