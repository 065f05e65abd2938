"""How fast the engine is, beside transformers and the roofline of the same machine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from benchmarks.checkpoints import IMAGE_TOKEN, checkpoint, draw_picture, make_llava
from gpu_parts import theirs
from gpu_parts.bench import Bench, Finding, free_memory, path_of
from gpu_parts.roofline import Bound, share
from gpu_parts.theirs import seconds_of
from nanovllm import LLM, SamplingParams
from nanovllm.checkpoints.resolve import resolve_checkpoint
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER

PROMPT = 64  # tokens before a measured decode


def serve(bench: Bench) -> Iterator[Finding]:
    """nano-vllm's own workload: all requests at once, drawn at temperature 0.6, lengths by its seed."""
    prompts, lengths = workload(bench)
    params = [SamplingParams(temperature=0.6, max_tokens=length, ignore_eos=True) for length in lengths]

    def ask(engine: LLM) -> Finding:
        engine.generate(prompts[0], SamplingParams(max_tokens=4), use_tqdm=False)
        before = engine.stats()
        seconds = seconds_of(lambda: engine.generate(prompts, params, use_tqdm=False))
        stats = engine.stats()
        rate = round(sum(lengths) / seconds, 1)
        print(f"nano-vllm's workload: {rate:,.0f} tokens/s, {seconds:.1f} s, {stats.steps - before.steps} steps")
        return {
            "prompt_tokens": sum(map(len, prompts)),
            "answer_tokens": sum(lengths),
            "seconds": round(seconds, 3),
            "tokens_per_second": rate,
            "engine_steps": stats.steps - before.steps,
            "preemptions": stats.num_preemptions,
            "of_the_roofline": share(Bound(bench).serve([len(one) for one in prompts], lengths), seconds),
            "weight_bytes": sum(weight.nbytes for weight in engine.model_runner.model.parameters()),
            "kv_cache_bytes": sum(layer.nbytes for layer in engine.model_runner.kv_caches),
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if bench.is_cuda else None,
            **path_of(engine, []),
        }

    figures = bench.ask(ask, dtype=bench.dtype, max_num_seqs=bench.scale.requests)
    yield figures
    baseline = theirs.serve(bench, prompts, lengths, temperature=0.6)
    print(f"nano-vllm's workload in transformers: {baseline['tokens_per_second']:,.0f} tokens/s")
    ratio = round(figures["tokens_per_second"] / baseline["tokens_per_second"], 2)
    yield {"transformers": baseline, "against_transformers": ratio}


def workload(bench: Bench) -> tuple[list[list[int]], list[int]]:
    """Prompts, and lengths of answers: at full scale the draws of nano-vllm's benchmark, in its order."""
    scale, draw, most = bench.scale, random.Random(0), min(10_000, bench.shape.vocab_size - 1)
    prompts = [
        [draw.randint(0, most) for _ in range(draw.randint(scale.shortest, scale.longest))]
        for _ in range(scale.requests)
    ]
    return prompts, [draw.randint(scale.shortest, scale.longest) for _ in prompts]


def decode(bench: Bench) -> Iterator[Finding]:
    """Steps of one token a row at each batch."""
    bound = Bound(bench)

    def ask(engine: LLM) -> dict[str, float]:
        return {str(batch): decode_rate(bench, engine, batch) for batch in bench.scale.batches}

    rates = bench.ask(ask, **decode_options(bench))
    print("decode: " + ", ".join(f"{rate:,.0f}/s at {batch}" for batch, rate in rates.items()))
    contexts = PROMPT + bench.scale.steps // 2
    shares = {
        str(batch): share(bound.decode([contexts] * batch), batch / rates[str(batch)]) for batch in bench.scale.batches
    }
    yield {"tokens_per_second": rates, "of_the_roofline": shares}
    model = bench.transformers(bench.dtype)
    baseline = {str(batch): theirs.decode(model, batch, PROMPT, 8) for batch in bench.scale.batches}
    del model
    free_memory()
    print("decode in transformers: " + ", ".join(f"{rate:,.0f}/s at {batch}" for batch, rate in baseline.items()))
    ratios = {batch: round(rate / baseline[batch], 2) for batch, rate in rates.items()}
    yield {"transformers": baseline, "against_transformers": ratios}


def decode_options(bench: Bench) -> dict[str, Any]:
    """Of engines whose decoding is measured: nothing is answered by a cache or a draft."""
    return {
        "dtype": bench.dtype,
        "enable_prefix_caching": False,
        "num_speculative_tokens": 0,
        "max_num_seqs": bench.scale.batches[-1],
    }


def decode_rate(bench: Bench, engine: LLM, batch: int, **sampling: float) -> float:
    """Tokens a second of ``batch`` requests that decode together."""
    scale = bench.scale
    params = SamplingParams(**{"temperature": 0.0, **sampling}, max_tokens=scale.steps + 16, ignore_eos=True)
    names = [engine.add_request(prompt, params) for prompt in bench.draw(batch, PROMPT, seed=batch)]
    started = engine.stats().generation_tokens
    while (stats := engine.stats()).num_requests_waiting or stats.generation_tokens - started < 4 * batch:
        engine.step()
    before = engine.stats().generation_tokens
    seconds = seconds_of(lambda: [engine.step() for _ in range(scale.steps)])
    tokens = engine.stats().generation_tokens - before
    for name in names:
        engine.abort(name)
    while engine.has_unfinished():
        engine.step()
    return round(tokens / seconds, 1)


def prefill(bench: Bench) -> Iterator[Finding]:
    """Prompts alone, 8 at once."""
    prompts = bench.draw(8, bench.scale.longest // 2, seed=2)
    tokens = sum(map(len, prompts))
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)

    def ask(engine: LLM) -> float:
        return min(seconds_of(lambda: engine.generate(prompts, params, use_tqdm=False)) for _ in range(3))

    seconds = bench.ask(ask, dtype=bench.dtype, enable_prefix_caching=False)
    model = bench.transformers(bench.dtype)
    baseline = theirs.prefill(model, prompts)
    del model
    free_memory()
    rate = round(tokens / seconds, 1)
    print(f"prefill: {rate:,.0f} tokens/s, transformers {baseline:,.0f}")
    yield {
        "tokens_per_second": rate,
        "of_the_roofline": share(Bound(bench).prefill(tokens), seconds),
        "transformers": baseline,
        "against_transformers": round(rate / baseline, 2),
    }


def images(bench: Bench) -> Iterator[Finding]:
    """One picture a request: all distinct, then one in eight; a ViT-B/16's shape before a medium text model."""
    count, tokens, placeholder = bench.scale.pictures, 16, IMAGE_TOKEN
    if bench.is_cuda:
        model = bench.directory / "llava"
        if not (model / "preprocessor_config.json").is_file() and not (model / "processor_config.json").is_file():
            make_llava(model, checkpoint("medium", bench.directory))
        write = lambda place: f"w{place + 5} w{place + 9} w7 {placeholder}\n"  # noqa: E731
    else:
        model, placeholder = resolve_checkpoint("tiny-receipts"), IMAGE_PLACEHOLDER
        write = lambda place: f"Question {place}: {placeholder}"  # noqa: E731
    work = {"distinct": count, "repeating": max(1, count // 8)}
    pictures = {
        name: [draw_picture(1000 * number + place % distinct) for place in range(count)]
        for number, (name, distinct) in enumerate(work.items(), start=1)
    }
    prompts = [write(place) for place in range(count)]
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    def ask(engine: LLM) -> dict[str, float]:
        engine.generate(prompts[:2], params, images=[[draw_picture(1)], [draw_picture(2)]], use_tqdm=False)
        return {
            name: seconds_of(
                lambda shown=shown: engine.generate(prompts, params, images=[[one] for one in shown], use_tqdm=False)
            )
            for name, shown in pictures.items()
        }

    seconds = bench.ask(ask, model, dtype=bench.dtype)
    rates = {name: round(count / spent, 1) for name, spent in seconds.items()}
    print("images: " + ", ".join(f"{rate:,.0f}/s {name}" for name, rate in rates.items()))
    yield {"requests_per_second": rates}
    baseline = read_by_transformers(bench, model, prompts, pictures, tokens)
    print("images in transformers: " + ", ".join(f"{rate:,.0f}/s {name}" for name, rate in baseline.items()))
    ratios = {name: round(rate / baseline[name], 2) for name, rate in rates.items()}
    yield {"transformers": baseline, "against_transformers": ratios}


def read_by_transformers(
    bench: Bench, directory: Path, prompts: list[str], pictures: dict[str, list[Any]], tokens: int
) -> dict[str, float]:
    """Requests a second."""
    processor = AutoProcessor.from_pretrained(directory)
    processor.tokenizer.padding_side = "left"
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=getattr(torch, bench.dtype))
    model = model.to(bench.device).eval()
    found = {
        name: round(len(prompts) / theirs.read(model, processor, prompts, shown, tokens), 1)
        for name, shown in pictures.items()
    }
    del model
    free_memory()
    return found
