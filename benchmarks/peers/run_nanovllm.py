"""This engine, with prefix and embedding cache on: a turn's prompts are new to them. Of any commit since 2a9ba20."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from protocol import Answers, serve

from nanovllm import LLM, SamplingParams

OPTIONS = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantization": "int8", "kv_cache_dtype": "bfloat16"},
}


class LinearClock:
    """The seconds that linear layers take: their products are replaced by timed ones."""

    def __init__(self, llm: LLM) -> None:
        from nanovllm.engine.layers.linear import Linear

        self.seconds = 0.0
        for part in (llm.model_runner.model, llm.model_runner.encoder):
            for layer in part.modules() if part is not None else ():
                if isinstance(layer, Linear | torch.nn.Linear):
                    layer.forward = self._timed(layer.forward)  # type: ignore[assignment]

    def _timed(self, product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def forward(*inputs: torch.Tensor) -> torch.Tensor:
            started = time.perf_counter()
            output = product(*inputs)
            self.seconds += time.perf_counter() - started
            return output

        return forward


class Ours:
    """A nanovllm.LLM."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        options = {**OPTIONS[args.precision], "kv_cache_bytes": args.kv_cache_bytes}
        self.llm = LLM(args.model, max_num_seqs=args.batch, **options)
        self.versions = {"torch": torch.__version__}
        self.clock = LinearClock(self.llm) if args.clocks else None

    def run(self, workload: dict[str, Any]) -> tuple[Answers, dict[str, Any]]:
        before, linear = self.llm.stats(), self.clock.seconds if self.clock else 0.0
        started = time.perf_counter()
        outputs = self.llm.generate(
            [request["prompt"] for request in workload["requests"]],
            [
                SamplingParams(
                    **({"seed": index, **workload["sampling"]} if workload["sampling"] else {"temperature": 0.0}),
                    max_tokens=request["max_tokens"],
                    ignore_eos=workload["ignore_eos"],
                    json_schema=request["json_schema"],
                )
                for index, request in enumerate(workload["requests"])
            ],
            images=[request["images"] for request in workload["requests"]],
            use_tqdm=False,
        )
        seconds = time.perf_counter() - started
        after = self.llm.stats()
        counted = ("steps", "prefix_cache_hits", "encoder_images", "encoder_seconds", "num_preemptions")
        details: dict[str, Any] = {"counters": {name: getattr(after, name) - getattr(before, name) for name in counted}}
        if self.clock:
            details["linear_share"] = round((self.clock.seconds - linear) / seconds, 3)
        return [list(output.token_ids) for output in outputs], details


serve(Ours)
