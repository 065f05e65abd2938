"""What the machine can do at all: bytes copied and products computed in a second, and what these bound."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from gpu_parts.bench import Bench, Finding, free_memory, synchronize


def measure(bench: Bench) -> Iterator[Finding]:
    """Bandwidth of the memory, read and written, and the peak of products of matrices."""
    copied, product = copied_per_second(bench), products_per_second(bench)
    free_memory()
    print(f"roofline: copies {copied / 1e9:,.0f} GB/s, multiplies {product / 1e12:,.1f} TFLOP/s in {bench.dtype}")
    yield {
        "dtype": bench.dtype,
        "copied_gb_per_second": copied / 1e9,
        "tflop_per_second": product / 1e12,
    }


def copied_per_second(bench: Bench) -> float:
    """Bytes, read and written, of a large copy."""
    block = torch.empty(bench.scale.copied_bytes, dtype=torch.uint8, device=bench.device)
    other = torch.empty_like(block)
    return 2 * block.nbytes / best_seconds(lambda: other.copy_(block))


def products_per_second(bench: Bench) -> float:
    """Operations of a large product of matrices of random numbers; of zeros it would be quicker."""
    width = bench.scale.multiplied
    left, right = (torch.randn(width, width, device=bench.device).to(getattr(torch, bench.dtype)) for _ in range(2))
    return 2 * width**3 / best_seconds(lambda: left @ right)


def best_seconds(compute: Callable[[], object], times: int = 5) -> float:
    """Seconds of the quickest of ``times`` calls, after one that warms up."""
    compute()
    found = []
    for _ in range(times):
        synchronize()
        started = time.perf_counter()
        compute()
        synchronize()
        found.append(time.perf_counter() - started)
    return min(found)


class Bound:
    """Least seconds that weights, keys and values, and products allow; None where the roofline is not known."""

    def __init__(self, bench: Bench) -> None:
        shape, known = bench.shape, bench.report.figures("roofline")
        self.known = bool(known)
        self._bytes_per_second = known.get("copied_gb_per_second", 0.0) * 1e9
        self._flop_per_second = known.get("tflop_per_second", 0.0) * 1e12
        attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim * shape.hidden_size
        layers = shape.layers * (attention + 3 * shape.hidden_size * shape.intermediate_size)
        self._products = layers  # of a token, but for the vocabulary, which only a sampled one is multiplied with
        self._weight_bytes = (layers + shape.vocab_size * shape.hidden_size) * bench.itemsize
        self._token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * bench.itemsize

    def decode(self, contexts: Sequence[int]) -> float | None:
        """Of a step in which rows with these contexts get one token each."""
        if not self.known:
            return None
        return (self._weight_bytes + self._token_bytes * sum(contexts)) / self._bytes_per_second

    def prefill(self, tokens: int) -> float | None:
        """Of the products of ``tokens`` prompt tokens, without attention."""
        return 2 * self._products * tokens / self._flop_per_second if self.known else None

    def serve(self, prompts: Sequence[int], answers: Sequence[int]) -> float | None:
        """Of requests with prompts and answers so long, all decoded together from the start."""
        prefill = self.prefill(sum(prompts))
        if prefill is None:
            return None
        read = sum(answer * prompt + answer**2 // 2 for prompt, answer in zip(prompts, answers, strict=True))
        bytes_read = self._weight_bytes * max(answers) + self._token_bytes * read
        return prefill + bytes_read / self._bytes_per_second


def share(bound: float | None, seconds: float) -> float | None:
    """How much of the roofline was reached."""
    return None if bound is None else round(bound / seconds, 3)
