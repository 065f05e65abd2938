"""``transformers``' continuous batching (paged cache, shared prefixes): text alone, as it takes no pictures."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import transformers
from protocol import Answers, serve
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

KV_CACHE_BYTES = 1 << 30  # taken from the machine at once
PAGE_TOKENS = 16
NO_TOKEN = -1


class Continuous:
    """A model and the manager that batches its requests; a manager has one way of sampling, and stays."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.precision == "int8":
            raise SystemExit("transformers has no int8 of its own on a CPU")
        torch.set_num_threads(args.threads)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            num_blocks=KV_CACHE_BYTES // (PAGE_TOKENS * token_bytes(self.model)),
            max_batch_tokens=512,
            max_requests_per_batch=args.batch,
        )
        self.manager: Any = None
        self.sampling: dict[str, float] | None = None
        self.turn = 0
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}

    @torch.inference_mode()
    def run(self, workload: dict[str, Any]) -> tuple[Answers, dict[str, Any]]:
        requests = workload["requests"]
        self._require_manager(workload["sampling"])
        self.turn += 1
        end = NO_TOKEN if workload["ignore_eos"] else self.tokenizer.eos_token_id
        for index, request in enumerate(requests):
            prompt = request["prompt"]
            tokens = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
            name = f"{self.turn}-{index}"
            self.manager.add_request(tokens, request_id=name, max_new_tokens=request["max_tokens"], eos_token_id=end)
        answers: dict[int, list[int]] = {}
        while len(answers) < len(requests):
            result = self.manager.get_result(timeout=1)
            if result is None:
                if not self.manager.is_running():
                    raise RuntimeError("the manager's thread has ended")
            elif result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                index = int(result.request_id.split("-")[1])
                answers[index] = list(result.generated_tokens)
                self.tokenizer.decode(answers[index])
        return [answers[index] for index in range(len(requests))], {}

    def _require_manager(self, sampling: dict[str, float] | None) -> None:
        if self.manager is not None and sampling == self.sampling:
            return
        if self.manager is not None:
            self.manager.stop(block=True)
            self.manager.destroy()
        how = {"do_sample": True, **sampling} if sampling else {"do_sample": False}
        self.manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(**how, max_new_tokens=1, eos_token_id=NO_TOKEN),
            continuous_batching_config=self.config,
        )
        self.manager.start()
        self.sampling = sampling


def token_bytes(model: Any) -> int:
    """Bytes of a token's keys and values in all layers."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size: int = 2 * config.num_hidden_layers * config.num_key_value_heads * head * model.dtype.itemsize
    return size


serve(Continuous)
os._exit(0)  # the manager's thread would keep the process
