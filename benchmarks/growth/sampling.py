"""A step's sampling against rows, vocabulary and what requests ask."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.growth.tree import Row, best, find, make_sequence, rows_of

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature with seeds": {"temperature": 0.7, "seed": 1},
    "temperature, top_p, top_k with seeds": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": 1},
    "repetition penalty over 32k tokens": {"temperature": 0.0, "repetition_penalty": 1.1},
}
VOCABULARY = 151_936


def measure(is_tiny: bool) -> list[Row]:
    """By rows over Qwen's vocabulary, and by the vocabulary at 32 rows."""
    rows, vocabularies = ((1, 2), (100, 1_000)) if is_tiny else ((1, 8, 32), (16_000, 49_152, 151_936))
    vocabulary, many, context = (1_000, 2, 64) if is_tiny else (VOCABULARY, 32, 32_768)
    return [
        *rows_of(lambda count: _costs(count, vocabulary, context), f"rows of {vocabulary:,} tokens", rows),
        *rows_of(lambda size: _costs(many, size, context), f"vocabulary of {many} rows", vocabularies),
    ]


def _costs(rows: int, vocabulary: int, context: int) -> dict[tuple[str, str], float]:
    from nanovllm import SamplingParams

    Sampler = find("engine.sampling.sampler:Sampler", "engine.sampler:Sampler")
    top_logprobs = find("engine.sampling.logprobs:top_logprobs", "engine.logprobs:top_logprobs")
    sampler = Sampler(torch.device("cpu"), 0)
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, options in CASES.items():
        tokens = [token % vocabulary for token in range(context if "32k" in name else 64)]
        sequences = [
            make_sequence(f"{row}", list(tokens), len(tokens) // 2, 64, sampling=SamplingParams(**options))
            for row in range(rows)
        ]
        found[name, "ms"] = 1e3 * best(lambda own=sequences: sampler.sample(logits.clone(), own), 3)  # type: ignore[misc]
    asked = [5] * rows
    found["5 log probabilities a row", "ms"] = 1e3 * best(lambda: top_logprobs(logits, asked, asked, str), 3)
    masks = torch.full((rows, -(-vocabulary // 32)), 7, dtype=torch.int32)
    found["constraints' masks", "ms"] = 1e3 * best(lambda: _forbid(logits.clone(), masks), 3)
    return found


def _forbid(logits: torch.Tensor, masks: torch.Tensor) -> None:
    forbid = find("engine.sampling.structured_output:forbid_masked", "engine.guided:forbid_masked")
    try:
        forbid(logits, find("engine.sampling.structured_output:GuidedRows")(torch.arange(len(logits)), masks))
    except LookupError:
        forbid(logits, masks)
