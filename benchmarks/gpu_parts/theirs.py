"""The same work in transformers: static batches, left padded, sorted by the length of the answers, kindest to them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from gpu_parts.bench import Bench, free_memory, synchronize


@torch.inference_mode()
def decode(model: Any, batch: int, prompt: int, steps: int) -> float:
    """Tokens a second of ``batch`` rows after prompts of ``prompt`` tokens, by the median step."""
    ids = torch.randint(2, model.config.vocab_size, (batch, prompt), device=model.device)
    output = model(ids, use_cache=True, logits_to_keep=1)
    seconds = []
    for _ in range(steps):
        synchronize()
        started = time.perf_counter()
        ids = output.logits[:, -1:].argmax(-1)
        output = model(ids, past_key_values=output.past_key_values, use_cache=True)
        synchronize()
        seconds.append(time.perf_counter() - started)
    return round(batch / statistics.median(seconds), 1)


@torch.inference_mode()
def prefill(model: Any, prompts: Sequence[Sequence[int]]) -> float:
    """Tokens a second of prompts of one length, all at once, by the best of three."""
    ids = torch.tensor(prompts, device=model.device)
    seconds = []
    for _ in range(3):
        synchronize()
        started = time.perf_counter()
        model(ids, logits_to_keep=1)
        synchronize()
        seconds.append(time.perf_counter() - started)
    return round(ids.numel() / min(seconds), 1)


@torch.inference_mode()
def serve(bench: Bench, prompts: Sequence[list[int]], lengths: Sequence[int], temperature: float) -> dict[str, Any]:
    """Useful tokens a second of requests with answers of ``lengths``; cut after ``baseline_seconds``."""
    found = _serve(bench, bench.transformers(bench.dtype), prompts, lengths, temperature)
    free_memory()
    return found


def _serve(
    bench: Bench, model: Any, prompts: Sequence[list[int]], lengths: Sequence[int], temperature: float
) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(bench.text, padding_side="left")
    order = sorted(range(len(prompts)), key=lambda place: lengths[place])
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

    def answer(places: Sequence[int], longest: int, seconds: float) -> int:
        batch = tokenizer.pad({"input_ids": [prompts[place] for place in places]}, return_tensors="pt")
        made = model.generate(
            **batch.to(bench.device), max_new_tokens=longest, eos_token_id=None, max_time=seconds, **sampling
        )
        synchronize()
        return made.shape[1] - batch["input_ids"].shape[1]

    size, rest, useful = bench.scale.baseline_batch, order, 0
    answer(order[:2], 2, 60.0)
    started = time.perf_counter()
    while rest and (left := bench.scale.baseline_seconds - (time.perf_counter() - started)) > 0:
        places = rest[:size]
        try:
            made = answer(places, max(lengths[place] for place in places), left)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
            free_memory()
            continue
        useful += sum(min(made, lengths[place]) for place in places)
        rest = rest[size:]
    seconds = time.perf_counter() - started
    return {
        "batch": size,
        "seconds": round(seconds, 2),
        "tokens": useful,
        "was_cut": useful < sum(lengths),
        "tokens_per_second": round(useful / seconds, 1),
    }


@torch.inference_mode()
def read(
    model: Any, processor: Any, prompts: Sequence[str], pictures: Sequence[Any], tokens: int, batch: int = 32
) -> float:
    """Seconds for answers of ``tokens`` tokens to prompts with one picture each."""

    def answer(first: int, longest: int) -> None:
        inputs = processor(
            text=list(prompts[first : first + batch]), images=list(pictures[first : first + batch]), padding=True,
            return_tensors="pt",
        ).to(model.device)  # fmt: skip
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        model.generate(**inputs, do_sample=False, max_new_tokens=longest, min_new_tokens=longest)
        synchronize()

    answer(0, 2)
    return seconds_of(lambda: [answer(first, tokens) for first in range(0, len(prompts), batch)])


def seconds_of(work: Callable[[], object]) -> float:
    """How long ``work`` takes, the GPU's part included."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started
