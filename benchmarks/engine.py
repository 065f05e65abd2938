"""The engine against ``transformers`` ``generate``, on the same checkpoint, requests, precision and threads.

Both sides answer the same greedy requests and hand back text. ``transformers`` gets static batches as kind as they can
be made: requests sorted by the length of their answers (known beforehand here, never in life), left padded, batches as
wide as the engine's ``max_num_seqs``. Useful tokens are those of the answers up to their end; what a static batch
computes for rows that have ended counts for nothing. Caches of the engine are off, so that a repeat repeats the work.
Repeats alternate between the sides; the figures are medians. Outputs must agree up to float ties.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration, Qwen3ForCausalLM

from benchmarks.checkpoints import SHAPES, make_text_checkpoint
from benchmarks.machine import describe_machine
from benchmarks.output import add_output, write_text
from nanovllm import LLM, SamplingParams
from nanovllm.checkpoints.resolve import resolve_checkpoint
from nanovllm.errors import ModelNotFound
from nanovllm.training import synthetic

TIE = 1e-3  # two logits nearer than this may change places between two ways to compute them


@dataclass(frozen=True)
class Question:
    """One request: text or token ids, images in the order of their placeholders, and a bound on the answer."""

    prompt: str | list[int]
    images: tuple[Image.Image, ...]
    max_tokens: int


@dataclass(frozen=True)
class Run:
    """One side's answers, in the order of the questions, and the time that all of them took: by the clock, and of CPUs.

    Other work on the machine moves the first figure far more than the second.
    """

    token_ids: list[list[int]]
    seconds: float
    cpu_seconds: float


def main() -> int:
    """Run what was asked for, print a table and write the JSON; 1 when outputs differ by more than ties."""
    args = read_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "machine": describe_machine("benchmarks/engine.py " + " ".join(sys.argv[1:])),
        "settings": {
            "requests": args.requests,
            "repeats": args.repeats,
            "batch": args.batch,
            "threads": args.threads,
            "dtype": str(args.dtype).removeprefix("torch."),
        },
        "workloads": {},
    }
    for name in args.workloads:
        with tempfile.TemporaryDirectory(prefix="nanovllm-bench-") as directory:
            workload = images_workload if name == "images" else text_workload
            report["workloads"][name] = figures = workload(args, Path(directory))
        print_figures(name, figures, args)
    write_text(args.output, json.dumps(report, indent=2) + "\n")
    print(f"written to {args.output}")
    return 0 if all(figures["outputs_agree"] for figures in report["workloads"].values()) else 1


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=["images", "text"], default=["images", "text"])
    parser.add_argument("--model", default="tiny-receipts", help="LLaVA checkpoint of the images workload")
    parser.add_argument("--text-size", choices=list(SHAPES), default="small", help="random-weight Qwen3 of this shape")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="width of a static batch, and max_num_seqs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    add_output(parser, "engine.json")
    return parser.parse_args()


def images_workload(args: argparse.Namespace, _: Path) -> dict[str, Any]:
    """Held-out questions of the project's own generator about receipts and shapes, one or two images each."""
    try:
        directory = resolve_checkpoint(args.model)
    except ModelNotFound as error:
        sys.exit(f"{error}\nName a LLaVA checkpoint with --model, or run --workloads text.")
    drawn = [synthetic.sample(index, seed=20, split="heldout") for index in range(args.requests)]
    questions = [Question(one.prompt, one.images, 128) for one in drawn]
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=args.dtype).to(args.device).eval()
    processor = AutoProcessor.from_pretrained(directory)
    processor.tokenizer.padding_side = "left"

    def encode(batch: list[Question]) -> Any:
        images = [image for question in batch for image in question.images]
        return processor(text=[question.prompt for question in batch], images=images, padding=True, return_tensors="pt")

    return compare(args, directory, questions, model, processor.tokenizer, encode, ignore_eos=False)


def text_workload(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Random prompts of 16 to 256 tokens and answers of 8 to 128 on a Qwen3 model with random weights."""
    shape = SHAPES[args.text_size]
    make_text_checkpoint(directory, shape)
    draw = random.Random(0)
    questions = [
        Question([draw.randrange(shape.vocab_size) for _ in range(draw.randint(16, 256))], (), draw.randint(8, 128))
        for _ in range(args.requests)
    ]
    model = Qwen3ForCausalLM.from_pretrained(directory, dtype=args.dtype).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")

    def encode(batch: list[Question]) -> Any:
        return tokenizer.pad({"input_ids": [question.prompt for question in batch]}, return_tensors="pt")

    figures = compare(args, directory, questions, model, tokenizer, encode, ignore_eos=True)
    return {"shape": args.text_size, "parameters": sum(p.numel() for p in model.parameters()), **figures}


def compare(
    args: argparse.Namespace,
    directory: Path,
    questions: list[Question],
    model: Any,
    tokenizer: Any,
    encode: Callable[[list[Question]], Any],
    *,
    ignore_eos: bool,
) -> dict[str, Any]:
    """Warm both sides up, alternate their repeats, check that they agree, and sum up."""
    engine = LLM(
        str(directory),
        max_num_seqs=args.batch,
        dtype=str(args.dtype).removeprefix("torch."),
        device=args.device,
        enable_prefix_caching=False,
        embedding_cache_bytes=0,
    )
    params = [SamplingParams(temperature=0.0, max_tokens=one.max_tokens, ignore_eos=ignore_eos) for one in questions]

    def ours(count: int) -> Run:
        started, cpu_started = time.perf_counter(), time.process_time()
        outputs = engine.generate(
            [question.prompt for question in questions[:count]],
            params[:count],
            images=[question.images for question in questions[:count]],
            use_tqdm=False,
        )
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        return Run([list(output.token_ids) for output in outputs], seconds, cpu_seconds)

    warm = ours(args.batch)
    lengths = [len(tokens) for tokens in ours(len(questions)).token_ids]

    def theirs(count: int) -> Run:
        answers: list[list[int]] = [[] for _ in range(count)]
        order = sorted(range(count), key=lambda index: lengths[index])
        started, cpu_started = time.perf_counter(), time.process_time()
        for first in range(0, count, args.batch):
            rows = order[first : first + args.batch]
            batch = [questions[row] for row in rows]
            generated = generate_static(model, encode(batch), batch, args, ignore_eos=ignore_eos)
            for row, tokens in zip(rows, generated, strict=True):
                answers[row] = trim(tokens, questions[row], None if ignore_eos else tokenizer.eos_token_id)
                tokenizer.decode(answers[row], skip_special_tokens=True)
        return Run(answers, time.perf_counter() - started, time.process_time() - cpu_started)

    theirs(len(warm.token_ids))
    runs: dict[str, list[Run]] = {"nanovllm": [], "transformers": []}
    for _ in range(args.repeats):
        runs["nanovllm"].append(ours(len(questions)))
        runs["transformers"].append(theirs(len(questions)))
    equal, ties, different = agreement(engine, model, encode, questions, runs)
    engine.close()
    sides = {name: sum_up(side) for name, side in runs.items()}
    ratio = {unit: sides["transformers"][unit] / sides["nanovllm"][unit] for unit in ("seconds", "cpu_seconds")}
    return {
        "model": directory.name if ignore_eos is False else "random weights",
        **sides,
        "ratio": round(ratio["seconds"], 3),
        "cpu_ratio": round(ratio["cpu_seconds"], 3),
        "outputs_equal": equal,
        "outputs_differ_by_a_tie": ties,
        "outputs_differ": different,
        "outputs_agree": different == 0,
    }


@torch.inference_mode()
def generate_static(
    model: Any, inputs: Any, batch: list[Question], args: argparse.Namespace, *, ignore_eos: bool
) -> list[list[int]]:
    """One static batch: it runs until its longest row has ended."""
    inputs = inputs.to(args.device)
    options = {"eos_token_id": None} if ignore_eos else {}
    longest = max(question.max_tokens for question in batch)
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=longest, **options)
    return generated[:, inputs["input_ids"].shape[1] :].tolist()


def trim(tokens: list[int], question: Question, eos_token_id: int | None) -> list[int]:
    """The useful part of a row: up to its own bound and its end-of-sequence token."""
    tokens = tokens[: question.max_tokens]
    return tokens[: tokens.index(eos_token_id) + 1] if eos_token_id in tokens else tokens


def agreement(
    engine: LLM,
    model: Any,
    encode: Callable[[list[Question]], Any],
    questions: list[Question],
    runs: dict[str, list[Run]],
) -> tuple[int, int, int]:
    """How many answers are equal, how many part at a float tie, and how many differ."""
    equal = ties = different = 0
    for question, ours, theirs in zip(
        questions, runs["nanovllm"][0].token_ids, runs["transformers"][0].token_ids, strict=True
    ):
        if ours == theirs:
            equal += 1
            continue
        shared = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if shared is not None and gap(model, encode([question]), ours, theirs, shared) < TIE:
            ties += 1
        else:
            different += 1
    return equal, ties, different


@torch.inference_mode()
def gap(model: Any, inputs: Any, ours: list[int], theirs: list[int], shared: int) -> float:
    """How far apart the logits of two next tokens are after the prompt and ``shared`` common tokens, relatively."""
    inputs = inputs.to(model.device)
    common = torch.tensor([ours[:shared]], dtype=torch.long, device=model.device)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], common], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = model(**inputs).logits[0, -1].float()
    return float((logits[ours[shared]] - logits[theirs[shared]]).abs() / logits.abs().max())


def sum_up(runs: list[Run]) -> dict[str, Any]:
    """Medians over the repeats."""
    seconds = statistics.median(run.seconds for run in runs)
    tokens = sum(len(answer) for answer in runs[0].token_ids)
    return {
        "seconds": round(seconds, 4),
        "cpu_seconds": round(statistics.median(run.cpu_seconds for run in runs), 4),
        "seconds_of_each_repeat": [round(run.seconds, 4) for run in runs],
        "requests_per_second": round(len(runs[0].token_ids) / seconds, 3),
        "useful_tokens": tokens,
        "useful_tokens_per_second": round(tokens / seconds, 2),
    }


def print_figures(name: str, figures: dict[str, Any], args: argparse.Namespace) -> None:
    """The figures of one workload for people."""
    print(f"\n{name}: {args.requests} requests, {args.batch} at once, median of {args.repeats}")
    for side in ("nanovllm", "transformers"):
        one = figures[side]
        print(
            f"  {side:<13}{one['seconds']:>9.2f} s {one['cpu_seconds']:>9.2f} CPU s "
            f"{one['requests_per_second']:>9.2f} requests/s {one['useful_tokens_per_second']:>9.1f} useful tokens/s"
        )
    print(
        f"  ratio {figures['ratio']:.2f} (of CPU time {figures['cpu_ratio']:.2f}); answers equal "
        f"{figures['outputs_equal']}, parted at a float tie {figures['outputs_differ_by_a_tie']}, "
        f"different {figures['outputs_differ']}"
    )


if __name__ == "__main__":
    sys.exit(main())
