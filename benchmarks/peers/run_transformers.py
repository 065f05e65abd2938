"""``transformers`` generate: static batches, left padded, sorted by the length of the answers: the kindest order."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers
from PIL import Image
from protocol import Answers, serve
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)


class Static:
    """A model whose batch runs until its longest answer has ended."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.precision == "int8":
            raise SystemExit("transformers has no int8 of its own on a CPU")
        dtype: torch.dtype | str = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
        if args.own_defaults:
            dtype = "auto"  # the checkpoint's
        else:
            torch.set_num_threads(args.threads)
        self.batch = args.batch
        sees = hasattr(AutoConfig.from_pretrained(args.model), "vision_config")
        family = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        self.model = family.from_pretrained(args.model, dtype=dtype).eval()
        self.processor = AutoProcessor.from_pretrained(args.model) if sees else None
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.tokenizer.padding_side = "left"
        if self.processor is not None:
            self.processor.tokenizer.padding_side = "left"
        self.versions = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "dtype": str(self.model.dtype),
        }

    @torch.inference_mode()
    def run(self, workload: dict[str, Any]) -> tuple[Answers, dict[str, Any]]:
        requests = workload["requests"]
        how = {"do_sample": True, **workload["sampling"]} if workload["sampling"] else {"do_sample": False}
        answers: list[list[int]] = [[] for _ in requests]
        order = sorted(range(len(requests)), key=lambda index: requests[index]["max_tokens"])
        for first in range(0, len(order), self.batch):
            rows = order[first : first + self.batch]
            inputs = self._encode([requests[row] for row in rows])
            longest = max(requests[row]["max_tokens"] for row in rows)
            options = {"min_new_tokens": longest} if workload["ignore_eos"] else {}
            made = self.model.generate(**inputs, **how, max_new_tokens=longest, **options)
            for row, tokens in zip(rows, made[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                answers[row] = tokens[: requests[row]["max_tokens"]]
                self.tokenizer.decode(answers[row])
        return answers, {}

    def _encode(self, requests: list[dict[str, Any]]) -> Any:
        prompts = [request["prompt"] for request in requests]
        if self.processor is not None:
            images = [Image.open(path).convert("RGB") for request in requests for path in request["images"]]
            return self.processor(text=prompts, images=images or None, padding=True, return_tensors="pt")
        if isinstance(prompts[0], str):
            return self.tokenizer(prompts, padding=True, return_tensors="pt")
        return self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")


serve(Static)
