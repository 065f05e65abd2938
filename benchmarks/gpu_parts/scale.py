"""How much the parts ask: all of it on a GPU, a token of it in a smoke test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanovllm.engine.attention.selection import Heads


@dataclass(frozen=True)
class Scale:
    """Sizes of the parts."""

    shape: str
    dtypes: tuple[str, ...]
    kernels: tuple[tuple[Heads, int], ...]  # and tokens of a page
    tests: str  # pytest's -k
    prompts: int  # of a check of parity
    prompt_tokens: int  # of each, at least
    answer_tokens: int
    batches: tuple[int, ...]
    steps: int  # measured ones
    requests: int  # of the workload of nano-vllm
    shortest: int  # prompt and answer of it
    longest: int
    baseline_batch: int  # requests that transformers computes at once
    baseline_seconds: float  # after which transformers is cut, and what it has is counted
    held_out: int  # images that the shipped checkpoint reads
    pictures: int  # of the workloads of images
    copied_bytes: int
    multiplied: int  # width of the matrices that show the peak
    options: dict[str, Any]  # of every engine


FULL = Scale(
    shape="0.6b",
    dtypes=("float32", "bfloat16", "float16"),
    kernels=((Heads(16, 8, 128), 16), (Heads(14, 2, 64), 16), (Heads(6, 2, 24), 49), (Heads(8, 1, 256), 256)),
    tests="",
    prompts=12, prompt_tokens=300, answer_tokens=48,
    batches=(1, 8, 32, 64, 128, 256), steps=64,
    requests=256, shortest=100, longest=1024, baseline_batch=128, baseline_seconds=60.0,
    held_out=64, pictures=64,
    copied_bytes=1 << 30, multiplied=8192,
    options={},
)  # fmt: skip
SMOKE = Scale(
    shape="tiny",
    dtypes=("float32", "bfloat16"),
    kernels=((Heads(4, 2, 16), 16),),
    tests="shares_are_chosen",
    prompts=2, prompt_tokens=40, answer_tokens=6,
    batches=(1, 4), steps=4,
    requests=5, shortest=4, longest=16, baseline_batch=4, baseline_seconds=5.0,
    held_out=1, pictures=2,
    copied_bytes=1 << 24, multiplied=256,
    options={"kv_cache_bytes": 32 << 20, "max_num_seqs": 8},
)  # fmt: skip
