"""llama.cpp's own ``llama-batched-bench``: prompts and answers of equal length, which is what it measures.

It runs on made-up tokens, so there are no answers to compare. ``--work`` keeps the weights that it reads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from protocol import Answers, serve
from transformers import AutoConfig, AutoModelForCausalLM

BIN = Path(sys.prefix) / "build" / "bin"
FORMATS = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0"}


class BatchedBench:
    """One process a turn; it loads the model anew, outside its own measurement."""

    def __init__(self, args: argparse.Namespace) -> None:
        # At its own defaults it counts the cores and cuts prompts itself; weights stay in the type asked for.
        threads = str(args.threads)
        self.options = [] if args.own_defaults else ["-t", threads, "-tb", threads, "-b", "2048", "-ub", "512"]
        self.weights = convert(Path(args.model), Path(args.work), FORMATS[args.precision])
        source = BIN.parent.parent / "sdist"
        self.versions = {
            "llama_cpp_python": next(iter(source.glob("*.tar.gz")), source).name,
            "weights": self.weights.name,
        }

    def run(self, workload: dict[str, Any]) -> tuple[Answers, dict[str, Any]]:
        requests = workload["requests"]
        prompt, answer = len(requests[0]["prompt"]), requests[0]["max_tokens"]
        context = len(requests) * (prompt + answer + 32)
        command = [str(BIN / "llama-batched-bench"), "-m", str(self.weights), "-npp", str(prompt), "-ntg", str(answer)]
        command += ["-npl", str(len(requests)), "-c", str(context), *self.options, "--output-format", "jsonl"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures = next(json.loads(line) for line in output.splitlines() if line.startswith("{"))
        prefill, decode = figures["t_pp"], figures["t_tg"]
        seconds = decode if workload["name"].startswith("decode") else prefill + decode
        return None, {
            "tokens_per_second": len(requests) * answer / seconds,
            "prefill_tokens_per_second": figures["speed_pp"],
        }


def convert(model: Path, work: Path, weights: str) -> Path:
    """The checkpoint as a GGUF file without a vocabulary (made-up tokens need none)."""
    full = work / f"{model.name}-f32.gguf"
    if not full.exists():
        write_gguf(model, full.with_suffix(".part"))
        full.with_suffix(".part").rename(full)
    if weights == "f32":
        return full
    output = work / f"{model.name}-{weights}.gguf"
    if not output.exists():
        # Q8_0 throughout: left to itself it would keep a tied embedding in another format.
        keep = ["--pure"] if weights == "q8_0" else []
        subprocess.run([str(BIN / "llama-quantize"), *keep, str(full), str(output), weights], check=True)
    return output


def write_gguf(model: Path, path: Path) -> None:
    """A Qwen3 or Llama checkpoint under llama.cpp's names for its tensors."""
    config = AutoConfig.from_pretrained(model)
    family = {"qwen3": gguf.MODEL_ARCH.QWEN3, "llama": gguf.MODEL_ARCH.LLAMA}[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(family, config.num_hidden_layers)
    state = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if family == gguf.MODEL_ARCH.LLAMA and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleave(tensor, head_dim)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of each head from halves to pairs: llama.cpp rotates a Llama's neighbours, transformers its halves."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


serve(BatchedBench)
