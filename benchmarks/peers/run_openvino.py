"""OpenVINO GenAI's ContinuousBatchingPipeline on a checkpoint that optimum-intel exports once."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from PIL import Image
from protocol import Answers, serve

KV_CACHE_GIB = 4


class Pipeline:
    """A continuous batch with prefix caching; bf16 products where the CPU has them, also between int8 weights."""

    def __init__(self, args: argparse.Namespace) -> None:
        model = export(Path(args.model), Path(args.work), "int8" if args.precision == "int8" else "fp32")
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = args.batch
        scheduler.max_num_batched_tokens = 2048
        scheduler.cache_size = KV_CACHE_GIB
        scheduler.enable_prefix_caching = True
        hint = "f32" if args.precision == "fp32" or "BF16" not in capabilities() else "bf16"
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(model), scheduler, "CPU", {"INFERENCE_NUM_THREADS": args.threads, "INFERENCE_PRECISION_HINT": hint}
        )
        self.versions = {
            "openvino_genai": openvino_genai.__version__,
            "openvino": openvino.__version__,
            "precision_hint": hint,
        }

    def run(self, workload: dict[str, Any]) -> tuple[Answers, dict[str, Any]]:
        requests = workload["requests"]
        configs = [configure(request, ignore_eos=workload["ignore_eos"]) for request in requests]
        if requests[0]["images"]:
            prompts = [request["prompt"] for request in requests]
            images = [[read_picture(path) for path in request["images"]] for request in requests]
            self.pipeline.generate(prompts, images=images, generation_config=configs)
            return None, {}  # it hands back text only
        tokens = [self._encode(request["prompt"]) for request in requests]
        results = self.pipeline.generate(tokens, configs)
        return [list(result.m_generation_ids[0]) for result in results], {}

    def _encode(self, prompt: str | list[int]) -> openvino.Tensor:
        if isinstance(prompt, str):
            return self.pipeline.get_tokenizer().encode(prompt, add_special_tokens=False).input_ids
        return openvino.Tensor(np.array([prompt], dtype=np.int64))


def capabilities() -> list[str]:
    """What the CPU computes in, as OpenVINO names it."""
    return openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def configure(request: dict[str, Any], *, ignore_eos: bool) -> openvino_genai.GenerationConfig:
    """Greedy, and as long as it is bound to be."""
    config = openvino_genai.GenerationConfig()
    config.do_sample = False
    config.max_new_tokens = request["max_tokens"]
    config.ignore_eos = ignore_eos
    config.apply_chat_template = False
    if ignore_eos:
        config.min_new_tokens = request["max_tokens"]
    if request["json_schema"] is not None:
        config.structured_output_config = openvino_genai.StructuredOutputConfig(
            json_schema=json.dumps(request["json_schema"])
        )
    return config


def read_picture(path: str) -> openvino.Tensor:
    """[1, height, width, 3] in bytes."""
    return openvino.Tensor(np.asarray(Image.open(path).convert("RGB"))[None].copy())


def export(model: Path, work: Path, weights: str) -> Path:
    """The checkpoint in OpenVINO's format, made on first use."""
    output = work / f"{model.name}-openvino-{weights}"
    if not (output / "generation_config.json").exists():
        sees = "vision_config" in json.loads((model / "config.json").read_text())
        task = "image-text-to-text" if sees else "text-generation-with-past"
        command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", str(model)]
        command += ["--task", task, "--weight-format", weights, str(output)]
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return output


serve(Pipeline)
