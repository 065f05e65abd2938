"""What only a GPU can prove: that the engine is right there, and how fast. One run, minutes, nothing from the net.

``python benchmarks/gpu.py`` (with ``PYTHONPATH=.`` where the package is not installed) checks and measures the engine
on random weights in a named shape and on the shipped checkpoint, prints both and writes a JSON file. It exits
with 1 when a check fails. ``--smoke`` runs all of it on a CPU, in little.

First the kernels of attention are held against plain torch. Then the figures, and the checks of the whole: the engine
answers greedily, and ``transformers`` in float32 scores the answers. In float32 every token must be
the best one there, up to a tie, and its log probability the same. In half precision log probabilities may be off by
about as much as those of ``transformers`` in that precision are. That is asked of steps in CUDA graphs and without, of
prompts in chunks and of a warm prefix cache.
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
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from checkpoints import SHAPES, make_text_checkpoint
from machine import describe_machine
from output import add_output, write_text
from transformers import AutoTokenizer, Qwen3ForCausalLM

from nanovllm import LLM, SamplingParams
from nanovllm.engine.attention.base import AttentionBackend
from nanovllm.engine.attention.selection import TOLERANCES, Heads, choose_backend, trial
from nanovllm.engine.diagnostics import describe
from nanovllm.engine.outputs import RequestOutput
from nanovllm.training import synthetic
from nanovllm.training.evaluate import EVALUATION_SEED

TIE = 1e-2  # log probabilities nearer than this are equal in float32: sums in another order, over dozens of layers
ALLOWANCE = 1.5  # times the error of transformers in the same precision
READ_EXACTLY = 0.9  # of the shipped checkpoint's held-out samples; on a CPU it is 0.98
MODES: dict[str, dict[str, Any]] = {
    "graphs": {},
    "without graphs": {"enforce_eager": True},
    "chunks of 48": {"max_num_batched_tokens": 48},
    "warm prefix cache": {},
}


@dataclass(frozen=True)
class Scale:
    """How much is asked: all of it on a GPU, a token of it in a smoke test."""

    shape: str
    dtypes: tuple[str, ...]
    kernels: tuple[tuple[Heads, int], ...]  # and tokens of a page
    prompts: int  # of a check
    prompt_tokens: int  # of each, at least
    answer_tokens: int
    batches: tuple[int, ...]
    steps: int  # measured ones
    requests: int  # of the varied workload
    longest_prompt: int
    longest_answer: int
    images: int
    options: dict[str, Any]  # of every engine


FULL = Scale(
    "0.6b",
    ("float32", "bfloat16", "float16"),
    ((Heads(16, 8, 128), 16), (Heads(14, 2, 64), 16), (Heads(6, 2, 24), 49), (Heads(8, 1, 256), 256)),
    12, 300, 48, (1, 8, 32, 64, 128, 256), 64, 64, 512, 256, 64, {},
)  # fmt: skip
SMOKE = Scale(
    "tiny", ("float32", "bfloat16"), ((Heads(4, 2, 16), 16),),
    4, 40, 8, (1, 4), 4, 6, 24, 12, 4, {"kv_cache_bytes": 32 << 20, "max_num_seqs": 8},
)  # fmt: skip


def main() -> int:
    """Check, measure, print, write; 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="everything in little, on a CPU")
    parser.add_argument(
        "--shape", choices=list(SHAPES), help=f"of the random weights; {FULL.shape} unless told otherwise"
    )
    add_output(parser, "gpu.json")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU; --smoke runs on a CPU")
    scale, device = (SMOKE, "cpu") if args.smoke else (FULL, "cuda")
    shape = args.shape or scale.shape
    torch.backends.cuda.enable_cudnn_sdp(False)  # for transformers as well, each of whose steps has a new shape
    started = time.perf_counter()
    report: dict[str, Any] = {
        "machine": {**describe_machine("benchmarks/gpu.py" + " --smoke" * args.smoke), **describe_gpu(device)},
        "shape": shape,
        "checks": [],
        "figures": {},
    }

    def save() -> None:
        report["seconds"] = round(time.perf_counter() - started, 1)
        write_text(args.output, json.dumps(report, indent=2) + "\n")

    def note(checks: Iterator[dict[str, Any]]) -> None:
        for check in checks:
            report["checks"].append(check)
            print_check(check)
            save()

    # A limit of time may end the run anywhere: what is known by then is in the file.
    note(check_kernels(scale, torch.device(device)))
    with tempfile.TemporaryDirectory(prefix="nanovllm-gpu-") as directory:
        bench = Bench(scale, shape, device, Path(directory))
        for figures in bench.measure():
            report["figures"] |= figures
            save()
        note(bench.check())
    failed = [check["name"] for check in report["checks"] if not check["passed"]]
    verdict = f"FAILED: {', '.join(failed)}" if failed else "all right"
    print(f"\n{report['seconds']:.0f} s, written to {args.output}; {verdict}")
    return 1 if failed else 0


def describe_gpu(device: str) -> dict[str, Any]:
    """The accelerator, and how fast it copies its own memory: what decoding is bound by."""
    if device == "cpu":
        return {"gpu": None}
    properties = torch.cuda.get_device_properties(0)
    block = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    other = torch.empty_like(block)
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        other.copy_(block)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "triton": version_of("triton"),
        "copied_gb_per_second": round(2 * block.nbytes / min(seconds) / 1e9, 1),  # read and written
    }


def version_of(package: str) -> str | None:
    """The installed version, None without one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_kernels(scale: Scale, device: torch.device) -> Iterator[dict[str, Any]]:
    """Attention alone against plain torch: our Triton kernel on CUDA, what an engine would choose on a CPU."""
    for dtype in scale.dtypes:
        for heads, page in scale.kernels:
            name = f"kernels, {dtype}, {heads.num} on {heads.num_kv} heads of {heads.dim}, pages of {page}"
            try:
                backend = kernels_of(device, getattr(torch, dtype), page)
                if backend is None:
                    print("kernels: Triton is not installed")
                    return
                error = trial(backend, device, getattr(torch, dtype), heads)
            except Exception as raised:
                yield failure(name, raised)
                continue
            passed = error <= TOLERANCES[getattr(torch, dtype)]
            yield {"name": name, "passed": passed, "attention": backend.name, "worst_error": error}


def kernels_of(device: torch.device, dtype: torch.dtype, page: int) -> AttentionBackend | None:
    """What is to be checked on ``device``; None where it is not there."""
    if device.type == "cpu":
        return choose_backend(device, dtype, page)
    try:
        from nanovllm.engine.attention.triton_paged import TritonAttention
    except ModuleNotFoundError:
        return None
    return TritonAttention(device, page)


class Bench:
    """One checkpoint of random weights, and what is asked of it."""

    def __init__(self, scale: Scale, shape: str, device: str, directory: Path) -> None:
        self.scale, self.device, self.directory = scale, device, directory
        self.vocab = SHAPES[shape].vocab_size
        make_text_checkpoint(directory, SHAPES[shape])

    @contextmanager
    def engine(self, **options: Any) -> Iterator[LLM]:
        """An engine of the checkpoint; the caller forgets it before he frees its memory."""
        with LLM(str(self.directory), device=self.device, **{**options, **self.scale.options}) as engine:
            yield engine

    def transformers(self, dtype: str) -> Any:
        """The same weights in transformers."""
        return Qwen3ForCausalLM.from_pretrained(self.directory, dtype=getattr(torch, dtype)).to(self.device).eval()

    def draw(self, count: int, tokens: int, seed: int) -> list[list[int]]:
        """Random prompts of ``tokens`` tokens and a few more each."""
        draw = random.Random(seed)
        return [[draw.randrange(2, self.vocab) for _ in range(tokens + 3 * place)] for place in range(count)]

    def check(self) -> Iterator[dict[str, Any]]:
        """Whether the engine is right, in every precision and in every way to compute."""
        prompts = self.draw(self.scale.prompts, self.scale.prompt_tokens, seed=1)
        params = SamplingParams(temperature=0.0, max_tokens=self.scale.answer_tokens, ignore_eos=True, logprobs=1)
        for dtype in self.scale.dtypes:
            asked: dict[str, list[RequestOutput]] = {}
            paths: dict[str, dict[str, Any]] = {}
            for mode, options in MODES.items():
                try:
                    with self.engine(dtype=dtype, **{"kv_cache_bytes": 4 << 30, **options}) as engine:
                        if mode == "warm prefix cache":
                            engine.generate(prompts, params, use_tqdm=False)
                        asked[mode] = outputs = engine.generate(prompts, params, use_tqdm=False)
                        paths[mode] = path_of(engine, outputs)
                    del engine
                except Exception as error:
                    yield failure(f"{dtype}, {mode}", error)
                free_memory()
            # The answers are scored by transformers in float32, and for its own error in that precision.
            model = self.transformers("float32")
            exact = {mode: score_all(model, prompts, outputs) for mode, outputs in asked.items()}
            if dtype != "float32":
                del model
                free_memory()
                model = self.transformers(dtype)
            for mode, outputs in asked.items():
                scores = exact[mode] if dtype == "float32" else score_all(model, prompts, outputs)
                theirs = mean_error([one.taken for one in scores], exact[mode])
                yield judge(f"{dtype}, {mode}", dtype, outputs, exact[mode], theirs, paths[mode])
            del model
            free_memory()
            try:
                yield self.images(dtype)
            except Exception as error:
                yield failure(f"{dtype}, images", error)

    def images(self, dtype: str) -> dict[str, Any]:
        """The shipped checkpoint reads receipts and shapes that it never saw."""
        samples = [synthetic.sample(index, seed=EVALUATION_SEED, split="heldout") for index in range(self.scale.images)]
        options = {"kv_cache_bytes": 256 << 20, **self.scale.options}
        with LLM("tiny-receipts", device=self.device, dtype=dtype, **options) as engine:
            outputs = engine.generate(
                [one.prompt for one in samples],
                SamplingParams(temperature=0.0, max_tokens=160),
                images=[one.images for one in samples],
                use_tqdm=False,
            )
            path = path_of(engine, outputs)
        free_memory()
        exact = statistics.fmean(one.answer == output.text for one, output in zip(samples, outputs, strict=True))
        return {"name": f"{dtype}, images", "passed": exact >= READ_EXACTLY, "read_exactly": exact, **path}

    def measure(self) -> Iterator[dict[str, Any]]:
        """How fast, in bfloat16 on a GPU; the figures one after another."""
        dtype = "float32" if self.device == "cpu" else "bfloat16"
        decode: dict[str, dict[str, float]] = {}
        useful = 0.0
        for mode in ("graphs", "without graphs"):
            with self.engine(
                dtype=dtype,
                enable_prefix_caching=False,
                num_speculative_tokens=0,
                **{"max_num_seqs": self.scale.batches[-1], **MODES[mode]},
            ) as engine:
                if mode == "graphs":
                    print(f"attention: {path_of(engine, [])['attention']}")
                decode[mode] = rates = {str(batch): self.decode(engine, batch) for batch in self.scale.batches}
                print(f"decode, {mode}: " + ", ".join(f"{rate:,.0f}/s at {batch}" for batch, rate in rates.items()))
                yield {"dtype": dtype, "decode_tokens_per_second": decode}
                if mode == "graphs":
                    figures = self.whole(engine)
                    useful = figures["varied"]["useful_tokens_per_second"]
                    yield figures
            del engine
            free_memory()
        yield {
            "graphs_against_none": {
                batch: round(rate / decode["without graphs"][batch], 2) for batch, rate in decode["graphs"].items()
            }
        }
        theirs = self.static_batches(dtype)
        ratio = round(useful / theirs["useful_tokens_per_second"], 2)
        print(f"varied workload: {ratio:.2f} times transformers' static batches, sorted by length")
        yield {"transformers": theirs, "varied_against_transformers": ratio}

    def decode(self, engine: LLM, batch: int) -> float:
        """Tokens a second of ``batch`` requests that decode together, by the median step."""
        params = SamplingParams(temperature=0.0, max_tokens=self.scale.steps + 16, ignore_eos=True)
        names = [engine.add_request(prompt, params) for prompt in self.draw(batch, 64, seed=batch)]
        while engine.scheduler.waiting or any(one.num_output_tokens < 4 for one in engine.scheduler.running):
            engine.step()
        seconds = []
        for _ in range(self.scale.steps):
            started = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - started)
        for name in names:
            engine.abort(name)
        while engine.has_unfinished():
            engine.step()
        return round(batch / statistics.median(seconds), 1)

    def whole(self, engine: LLM) -> dict[str, Any]:
        """Prompts alone, then the varied workload; and the memory that both took."""
        prompts = self.draw(8, self.scale.longest_prompt, seed=2)
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            engine.generate(prompts, params, use_tqdm=False)
            seconds.append(time.perf_counter() - started)
        prefill = round(sum(map(len, prompts)) / min(seconds), 1)
        questions, lengths = self.varied()
        wanted = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
        started = time.perf_counter()
        engine.generate(questions, wanted, use_tqdm=False)
        elapsed = time.perf_counter() - started
        cache = engine.model_runner.kv_caches
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
        rate = round(sum(lengths) / elapsed, 1)
        print(f"prefill: {prefill:,.0f} tokens/s; varied workload: {rate:,.0f} useful tokens/s")
        return {
            **path_of(engine, []),
            "prefill_tokens_per_second": prefill,
            "varied": {"seconds": round(elapsed, 3), "useful_tokens_per_second": rate},
            "weight_bytes": sum(weight.nbytes for weight in engine.model_runner.model.parameters()),
            "kv_cache_bytes": sum(layer.nbytes for layer in cache),
            "peak_memory_bytes": peak,
        }

    def varied(self) -> tuple[list[list[int]], list[int]]:
        """Prompts and lengths of answers of the varied workload."""
        draw = random.Random(3)
        lengths = [
            draw.randint(self.scale.longest_prompt // 16, self.scale.longest_prompt) for _ in range(self.scale.requests)
        ]
        prompts = [[draw.randrange(2, self.vocab) for _ in range(length)] for length in lengths]
        return prompts, [draw.randint(self.scale.longest_answer // 16, self.scale.longest_answer) for _ in prompts]

    @torch.inference_mode()
    def static_batches(self, dtype: str) -> dict[str, Any]:
        """The varied workload in transformers: batches of 32 requests with answers of similar lengths, left padded."""
        model = self.transformers(dtype)
        tokenizer = AutoTokenizer.from_pretrained(self.directory, padding_side="left")
        prompts, lengths = self.varied()
        order = sorted(range(len(prompts)), key=lambda place: lengths[place])

        def answer(model: Any, places: list[int], longest: int) -> None:
            batch = tokenizer.pad({"input_ids": [prompts[place] for place in places]}, return_tensors="pt")
            model.generate(**batch.to(self.device), do_sample=False, max_new_tokens=longest, eos_token_id=None)
            if self.device == "cuda":
                torch.cuda.synchronize()

        answer(model, order[:32], 2)  # warms up
        started = time.perf_counter()
        for first in range(0, len(order), 32):
            places = order[first : first + 32]
            answer(model, places, max(lengths[place] for place in places))
        elapsed = time.perf_counter() - started
        del model
        free_memory()
        return {"seconds": round(elapsed, 3), "useful_tokens_per_second": round(sum(lengths) / elapsed, 1)}


@dataclass(frozen=True)
class Scores:
    """Log probabilities of an answer's tokens, and of the best token at each place; both [n], float32."""

    taken: torch.Tensor
    best: torch.Tensor


@torch.inference_mode()
def score_all(model: Any, prompts: list[list[int]], outputs: list[RequestOutput]) -> list[Scores]:
    """What transformers thinks of the answers, one by one."""
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([[*prompt, *output.token_ids]], device=model.device)
        logits = model(ids[:, :-1], logits_to_keep=len(output.token_ids)).logits[0].float()
        logprobs = logits.log_softmax(-1)
        taken = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
        found.append(Scores(taken.cpu(), logprobs.amax(-1).cpu()))
    return found


def mean_error(logprobs: list[torch.Tensor], exact: list[Scores]) -> float:
    """How far off log probabilities are, on average."""
    return float(torch.cat([(one - two.taken).abs() for one, two in zip(logprobs, exact, strict=True)]).mean())


def judge(
    name: str, dtype: str, outputs: list[RequestOutput], exact: list[Scores], theirs: float, path: dict[str, Any]
) -> dict[str, Any]:
    """Hold answers against float32; ``theirs`` is the mean error of transformers in the same precision."""
    ours = [
        torch.tensor([entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs or (), strict=True)])
        for one in outputs
    ]
    error = mean_error(ours, exact)
    gaps = torch.cat([one.best - one.taken for one in exact])
    worst = max(float((one - two.taken).abs().max()) for one, two in zip(ours, exact, strict=True))
    near = float(gaps.max()) <= TIE and worst <= TIE if dtype == "float32" else error <= ALLOWANCE * theirs
    took = path["cached_tokens"] > 0 or "warm" not in name
    if torch.cuda.is_available():
        took = took and (path["graph_replays"] == 0) == ("without graphs" in name)
    return {
        "name": name,
        "passed": near and took,
        "mean_logprob_error": error,
        "worst_logprob_error": worst,
        "mean_logprob_error_of_transformers": theirs,
        "best_tokens": float((gaps == 0).float().mean()),
        "worst_gap_to_the_best_token": float(gaps.max()),
        **path,
    }


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


def failure(name: str, error: Exception) -> dict[str, Any]:
    """A check that ended with an exception; the others go on."""
    traceback.print_exception(error)
    return {"name": name, "passed": False, "error": f"{type(error).__name__}: {error}"}


def print_check(check: dict[str, Any]) -> None:
    """A line for people."""
    if "error" in check:
        print(f"FAILED {check['name']:28} {check['error']}")
        return
    if "worst_error" in check:
        told = f"off by {check['worst_error']:.2g} at worst"
        print(f"{'ok' if check['passed'] else 'FAILED':6} {check['name']:28} {told}; {check['attention']}")
        return
    told = f"{check['read_exactly']:.1%} read exactly" if "read_exactly" in check else (
        f"log probabilities off by {check['mean_logprob_error']:.2g} (transformers' "
        f"{check['mean_logprob_error_of_transformers']:.2g}), {check['best_tokens']:.1%} best tokens"
    )  # fmt: skip
    replays = f"{check['graph_replays']} of {check['steps']} steps in graphs"
    print(f"{'ok' if check['passed'] else 'FAILED':6} {check['name']:28} {told}; {replays}; {check['attention']}")


def free_memory() -> None:
    """Give the GPU's memory back, so that the next one finds all of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
