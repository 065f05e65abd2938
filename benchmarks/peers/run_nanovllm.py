"""This engine, with prefix and embedding cache on: a turn's prompts are new to them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from protocol import Answers, serve

from nanovllm import LLM, SamplingParams
from nanovllm.engine.layers.linear import Linear

OPTIONS = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantization": "int8", "kv_cache_dtype": "bfloat16"},
}


class Ours:
    """A nanovllm.LLM."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        self.llm = LLM(args.model, max_num_seqs=args.batch, **OPTIONS[args.precision])
        self.versions = {"torch": torch.__version__}
        self.linear_seconds = 0.0
        runner = self.llm.model_runner
        for part in (runner.model, runner.encoder):
            for layer in part.modules() if part is not None else ():
                if isinstance(layer, Linear | torch.nn.Linear):
                    layer.forward = self.timed(layer.forward)  # type: ignore[assignment]

    def timed(self, product: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """A linear layer's product that adds its time to ``linear_seconds``."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            started = time.perf_counter()
            output = product(x)
            self.linear_seconds += time.perf_counter() - started
            return output

        return forward

    def run(self, workload: dict[str, Any]) -> tuple[Answers, dict[str, Any]]:
        before, self.linear_seconds = self.llm.stats(), 0.0
        started = time.perf_counter()
        outputs = self.llm.generate(
            [request["prompt"] for request in workload["requests"]],
            [
                SamplingParams(
                    temperature=0.0,
                    max_tokens=request["max_tokens"],
                    ignore_eos=workload["ignore_eos"],
                    json_schema=request["json_schema"],
                )
                for request in workload["requests"]
            ],
            images=[request["images"] for request in workload["requests"]],
            use_tqdm=False,
        )
        share = self.linear_seconds / (time.perf_counter() - started)
        after = self.llm.stats()
        counted = ("steps", "prefix_cache_hits", "encoder_images", "encoder_seconds", "num_preemptions")
        details = {name: getattr(after, name) - getattr(before, name) for name in counted}
        return [list(output.token_ids) for output in outputs], {"counters": details, "linear_share": round(share, 3)}


serve(Ours)
