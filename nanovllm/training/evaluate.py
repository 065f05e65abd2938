"""Evaluation of a checkpoint on held-out synthetic samples, by `transformers`, greedily and in fp32."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoProcessor, LlavaForConditionalGeneration

from nanovllm.training import synthetic

EVALUATION_SEED = 20261125
_MAX_NEW_TOKENS = 160
_BATCH_SIZE = 64


def evaluate(
    directory: Path, *, samples: int = 2000, seed: int = EVALUATION_SEED, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Evaluates the checkpoint in ``directory`` on ``samples`` held-out samples; returns counts, rates and bounds.

    An answer is exact when it equals the sample's character by character. Each group is given as ``{"n", "exact",
    "rate", "lower95"}``, where ``lower95`` is the lower end of Wilson's 95% interval.
    """
    processor = AutoProcessor.from_pretrained(directory)
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    marks: dict[str, list[bool]] = defaultdict(list)
    wrong = []
    for start in range(0, samples, 500):
        asked = [
            synthetic.sample(index, seed=seed, split="heldout") for index in range(start, min(samples, start + 500))
        ]
        for offset, (one, text) in enumerate(zip(asked, answers(model, processor, asked), strict=True)):
            for group in groups(one):
                marks[group].append(text == one.answer)
            if text != one.answer:
                wrong.append({"index": start + offset, "kind": one.kind, "wanted": one.answer, "got": text})
        report(f"{min(samples, start + 500)} of {samples} asked, {len(wrong)} wrong")
    return {
        "checkpoint_sha256": hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "dtype": "float32",
        "split": "heldout",
        "seed": seed,
        "samples": samples,
        "groups": {group: rate(marks[group]) for group in sorted(marks)},
        "wrong": wrong,
    }


def groups(sample: synthetic.Sample) -> Iterable[str]:
    """Groups that a sample counts in: its kind, what is promised of it, and whether its vendor is in the training."""
    yield f"kind: {sample.kind}"
    if sample.fields is None:
        yield "shapes"
        return
    promise = "single fields" if sample.kind in synthetic.FIELDS else f"receipts: {sample.kind}"
    seen = "vendors of training" if sample.vendor_seen else "vendors absent from training"
    yield promise
    yield f"{promise}, {seen}"


def rate(marks: Sequence[bool]) -> dict[str, float]:
    """Count, exact answers, their share and its lower bound."""
    exact = sum(marks)
    return {
        "n": len(marks),
        "exact": exact,
        "rate": round(exact / len(marks), 4),
        "lower95": round(wilson_lower(exact, len(marks)), 4),
    }


def wilson_lower(exact: int, n: int, z: float = 1.959964) -> float:
    """Lower end of Wilson's score interval for ``exact`` of ``n``; 0 for nothing."""
    if n == 0:
        return 0.0
    share = exact / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n)


@torch.inference_mode()
def answers(model: Any, processor: Any, samples: Sequence[synthetic.Sample]) -> list[str]:
    """Greedy answers, in order. Questions of one kind are equally long: batches need no padding."""
    texts = [""] * len(samples)
    places: Mapping[str, list[int]] = defaultdict(list)
    for index, one in enumerate(samples):
        places[one.kind].append(index)
    for indices in places.values():
        for start in range(0, len(indices), _BATCH_SIZE):
            chosen = indices[start : start + _BATCH_SIZE]
            inputs = processor(
                text=[samples[index].prompt for index in chosen],
                images=[list(samples[index].images) for index in chosen],
                return_tensors="pt",
            )
            written = model.generate(**inputs, do_sample=False, max_new_tokens=_MAX_NEW_TOKENS)
            for index, ids in zip(chosen, written[:, inputs["input_ids"].shape[1] :], strict=True):
                texts[index] = processor.tokenizer.decode(ids, skip_special_tokens=True)
    return texts


def table(result: Mapping[str, Any]) -> str:
    """Table of the groups for a terminal."""
    lines = [f"{'group':54} {'n':>5} {'exact':>5} {'rate':>7} {'lower95':>7}"]
    for name, figures in result["groups"].items():
        shares = f"{figures['rate']:7.2%} {figures['lower95']:7.2%}"
        lines.append(f"{name:54} {figures['n']:5d} {figures['exact']:5d} {shares}")
    return "\n".join(lines)
