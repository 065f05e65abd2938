"""The smallest run that has all kernels of an engine: prompts, decoding, greedy and drawn tokens, in two precisions."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.checkpoints import checkpoint
from nanovllm import LLM, SamplingParams


def main() -> int:
    """Generate a few tokens; raises what an engine raises."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = checkpoint("tiny", Path(os.environ["SMALLEST"]))
    params = [
        SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=1, max_tokens=4, ignore_eos=True),
        SamplingParams(temperature=0.8, max_tokens=4, ignore_eos=True),
    ]
    prompts = [list(range(2, 2 + length)) for length in (3, 17, 70)]
    for dtype in ("bfloat16", "float32"):
        options = {"kv_cache_bytes": 4 << 20, "max_num_seqs": 4, "max_model_len": 128, "enforce_eager": True}
        with LLM(str(model), device=device, dtype=dtype, **options) as engine:
            outputs = engine.generate(prompts, params, use_tqdm=False)
        assert [len(output.token_ids) for output in outputs] == [4, 4, 4]
    return 0


if __name__ == "__main__":
    sys.exit(main())
