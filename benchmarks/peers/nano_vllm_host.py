"""Host time of nano-vllm's decode steps, from a checkout: schedule, inputs as tensors, postprocess; no GPU, no model.

``python nano_vllm_host.py CHECKOUT STEPS ROWS …`` prints a JSON object: microseconds a step, medians, by rows.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch

PROMPT_TOKENS = 300
BLOCK_SIZE = 256


def make_package(name: str, directory: Path) -> None:
    """A package of ``directory`` whose ``__init__``, which imports flash-attn, does not run."""
    package = types.ModuleType(name)
    package.__path__ = [str(directory)]
    sys.modules[name] = package


def step_us(scheduler: Any, steps: int) -> float:
    """The median of ``steps`` decode steps; inputs as its ``ModelRunner.prepare_decode`` makes them."""
    times = []
    for _ in range(steps):
        began = time.thread_time()
        sequences, is_prefill = scheduler.schedule()
        ids, positions, slots, contexts = [], [], [], []
        for one in sequences:
            ids.append(one.last_token)
            positions.append(len(one) - 1)
            contexts.append(len(one))
            slots.append(one.block_table[-1] * BLOCK_SIZE + one.last_block_num_tokens - 1)
        width = max(len(one.block_table) for one in sequences)
        tables = [one.block_table + [-1] * (width - len(one.block_table)) for one in sequences]
        tensors = [torch.tensor(values, dtype=torch.int64) for values in (ids, positions)]
        tensors += [torch.tensor(values, dtype=torch.int32) for values in (slots, contexts, tables)]
        tensors.append(torch.tensor([one.temperature for one in sequences], dtype=torch.float32))
        tokens = torch.randint(2, 500, (len(sequences),)).tolist()
        scheduler.postprocess(sequences, tokens, is_prefill)
        times.append(time.thread_time() - began)
    return statistics.median(times) * 1e6


def main() -> None:
    """Measure each number of rows and print."""
    checkout, steps = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    make_package("nanovllm", checkout / "nanovllm")
    make_package("nanovllm.engine", checkout / "nanovllm" / "engine")
    sys.modules["flash_attn"] = types.ModuleType("flash_attn")
    if "xxhash" not in sys.modules:
        try:
            import xxhash  # noqa: F401
        except ImportError:  # only the hashes of full blocks need it, which a steady step has not
            sys.modules["xxhash"] = stand_in = types.ModuleType("xxhash")
            stand_in.xxh64 = Digest  # type: ignore[attr-defined]
    from nanovllm.engine.scheduler import Scheduler  # type: ignore[import-not-found]
    from nanovllm.engine.sequence import Sequence  # type: ignore[import-not-found]

    from nanovllm.sampling_params import SamplingParams

    config = types.SimpleNamespace(
        max_num_seqs=512, max_num_batched_tokens=1 << 20, eos=1, num_kvcache_blocks=4096, kvcache_block_size=BLOCK_SIZE
    )
    found = {}
    for rows in map(int, sys.argv[3:]):
        scheduler, draw = Scheduler(config), random.Random(0)
        params = SamplingParams(temperature=0.6, max_tokens=steps + 40, ignore_eos=True)
        for _ in range(rows):
            scheduler.add(Sequence([draw.randrange(2, 500) for _ in range(PROMPT_TOKENS)], params))
        sequences, is_prefill = scheduler.schedule()
        scheduler.postprocess(sequences, [5] * len(sequences), is_prefill)
        found[rows] = step_us(scheduler, steps)
    print(json.dumps(found))


class Digest:
    """The part of xxhash's ``xxh64`` that is called."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def update(self, part: bytes) -> None:
        """Add ``part``."""
        self._parts.append(part)

    def intdigest(self) -> int:
        """A number that equal parts share."""
        return hash(b"".join(self._parts))


if __name__ == "__main__":
    main()
