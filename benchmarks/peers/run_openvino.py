"""OpenVINO GenAI on a checkpoint that optimum-intel exports once: a continuous batch, of pictures too.

``VLMPipeline`` takes one request a call, and with ``scheduler_config`` runs it in a ContinuousBatchingPipeline of its
own. Many requests with pictures are given to that pipeline itself; at its own defaults VLMPipeline answers them one
after the other.
"""

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
        self.versions = {**versions(), "precision_hint": hint}

    def run(self, workload: dict[str, Any]) -> tuple[Answers, dict[str, Any]]:
        requests = workload["requests"]
        configs = [configure(request, workload, seed) for seed, request in enumerate(requests)]
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


class OwnDefaults(Pipeline):
    """What the CPU plugin and the scheduler choose themselves: bf16 where the CPU has it, cores, a growing cache."""

    def __init__(self, args: argparse.Namespace) -> None:
        model = str(export(Path(args.model), Path(args.work), "int8" if args.precision == "int8" else "fp32"))
        self.sees = "images" in args.kinds.split(",")
        if self.sees:
            self.pipeline = openvino_genai.VLMPipeline(model, "CPU")
        else:
            self.pipeline = openvino_genai.ContinuousBatchingPipeline(model, openvino_genai.SchedulerConfig(), "CPU")
        self.versions = {**versions(), "capabilities": ", ".join(capabilities())}

    def run(self, workload: dict[str, Any]) -> tuple[Answers, dict[str, Any]]:
        if not self.sees:
            return super().run(workload)
        for seed, request in enumerate(workload["requests"]):
            images = [read_picture(path) for path in request["images"]]
            config = configure(request, workload, seed)
            self.pipeline.generate(request["prompt"], images=images, generation_config=config)
        return None, {}


def versions() -> dict[str, str]:
    """What runs."""
    return {"openvino_genai": openvino_genai.__version__, "openvino": openvino.__version__}


def capabilities() -> list[str]:
    """What the CPU computes in, as OpenVINO names it."""
    return openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def configure(request: dict[str, Any], workload: dict[str, Any], seed: int) -> openvino_genai.GenerationConfig:
    """Greedy or drawn, and as long as it is bound to be."""
    config = openvino_genai.GenerationConfig()
    config.do_sample = workload["sampling"] is not None
    if config.do_sample:
        config.rng_seed = seed
        for name, value in workload["sampling"].items():
            setattr(config, name, value)
    config.max_new_tokens = request["max_tokens"]
    config.ignore_eos = workload["ignore_eos"]
    config.apply_chat_template = False
    if workload["ignore_eos"]:
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


serve(lambda args: OwnDefaults(args) if args.own_defaults else Pipeline(args))
