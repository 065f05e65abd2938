"""Diagnostics (``nanovllm doctor``): the engine's choices for this machine and checkpoint, and the resulting speed."""

from __future__ import annotations

import importlib.util
import os
import platform
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from nanovllm.checkpoints.transformers_version import untested_version
from nanovllm.engine import kernels
from nanovllm.engine.attention.cpu_paged import PagedCpuAttention
from nanovllm.engine.attention.sdpa import SdpaAttention
from nanovllm.engine.kernels import step_threads, tiles
from nanovllm.engine.layers import fused, product_choice
from nanovllm.engine.layers.linear import Linear, why_no_int8
from nanovllm.engine.layers.panel_forms import is_emulated, is_wide, name_of, panel_forms
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sampling.default_sampling import ignored_names
from nanovllm.errors import counted
from nanovllm.sampling_params import SamplingParams
from nanovllm.start_phases import START, Phase

if TYPE_CHECKING:
    from nanovllm.engine.models.generic_trial import TrialResult

_MIB = 1 << 20
_BATCHES = (1, 8, 32)
_PROMPT = 64  # tokens of a measured prompt
_PROMPTS = 4  # that are measured at once


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``note`` is the reason, or what would improve it."""

    subject: str
    value: str
    note: str = ""


def describe(engine: LLMEngine, defaults: SamplingParams | None = None) -> Iterator[Finding]:
    """The engine's choices; measures nothing. ``defaults``: what a worker's jobs get without their own."""
    backend = "native" if engine.model_runner.trial is None else "generic"
    yield Finding("backend", f"{backend} (engine.backend {engine.config.backend})")
    yield _machine(engine)
    yield from _instructions(engine)
    yield _threads(engine)
    name, checkpoint = Path(engine.config.model).name, engine.checkpoint
    yield Finding("model", f"{name}, {checkpoint.architecture}", f"revision {checkpoint.revision}")
    if (trial := engine.model_runner.trial) is not None:
        yield _support(engine, trial)
    yield Finding("transformers", transformers.__version__, untested_version())
    yield _sampling_defaults(engine, defaults or engine.get_default_sampling_params())
    yield _weights(engine)
    yield from _products(engine)
    yield _attention(engine)
    yield _step_limits(engine)
    if engine.model_runner.device.type == "cuda" and engine.model_runner.trial is None:
        yield _layers(engine)
    yield from _sampling(engine)
    yield _graphs(engine)
    yield from _memory(engine)
    if importlib.util.find_spec("llguidance") is None:
        yield Finding("guided output", "none", "pip install '.[guided]' in a clone")
    else:
        yield Finding("guided output", "JSON schema, regex, choice, grammar")


def take_first_token(engine: LLMEngine) -> Finding:
    """The phases of this process's start, which one token from the engine ends; the engine is idle."""
    with START.timed(Phase.FIRST_TOKEN):
        _requests(engine, 1, 1, 1, 0)
        while engine.has_unfinished():
            engine.step()
    return Finding("start", f"first token {START.age_s():.2f} s after the process began", str(START))


def measure(engine: LLMEngine, seconds: float = 10.0) -> Iterator[Finding]:
    """Decode and prefill for about ``seconds``, beside what the linear layers alone would allow; the engine is idle."""
    length = max(1, min(_PROMPT, engine.max_model_len // 2))
    blocks = engine.scheduler.blocks
    fit = min(engine.scheduler.max_num_seqs, blocks.num_blocks // blocks.blocks_for(length + 2))
    batches = [size for size in _BATCHES if size <= fit]
    share = seconds / (len(batches) + 1)
    rows = min(_PROMPTS * length, engine.scheduler.max_num_batched_tokens)
    bound = rows / _linears(engine, rows, _PROMPTS, share / 3)
    yield _measured(f"prefill, prompts of {length}", _prefill(engine, length, 2 * share / 3), bound)
    for size in batches:
        bound = size / _linears(engine, size, size, share / 3)
        yield _measured(f"decode, batch {size}", _decode(engine, size, length, 2 * share / 3), bound)


def _measured(subject: str, speed: float, bound: float) -> Finding:
    note = f"the linear layers alone: {bound:,.0f}, {speed / bound:.0%} of which is reached"
    return Finding(subject, f"{speed:,.0f} tokens/s", note)


def _machine(engine: LLMEngine) -> Finding:
    device = engine.model_runner.device
    if device.type == "cuda":
        return Finding("device", torch.cuda.get_device_name(device))
    return Finding("device", f"CPU, {platform.machine()}, {kernels.kind()}", f"torch {torch.__version__}")


def _instructions(engine: LLMEngine) -> Iterator[Finding]:
    """What linear layers could be multiplied by on this CPU, beside what the engine chose."""
    if engine.model_runner.device.type != "cpu":
        return
    forms, values, notes = panel_forms(), [], []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = name_of(dtype)
        if not is_emulated(dtype):
            values.append(f"{name} by {forms.get(name, 'oneDNN')}")
        elif forms:
            values.append(f"{name} widened to float32")
        else:
            notes.append(f"no {name}: this CPU has no instructions for it")
    if (reason := why_no_int8(engine.model_runner.device)) is None:
        values.append(f"int8 by {forms.get('int8', 'FBGEMM')}")
    else:
        notes.append(f"no int8: {reason}")
    if not forms:
        notes.append(f"no deterministic, and the rest is slower, without our kernels: {kernels.missing()}")
    yield Finding("instructions", ", ".join(values), "; ".join(notes))


def _threads(engine: LLMEngine) -> Finding:
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    notes = [f"more than the {cores} cores: set OMP_NUM_THREADS={cores}"] if threads > cores else []
    if threads > 1 and engine.model_runner.device.type == "cpu":
        notes.append(_waiting(spins=threads <= cores))
    return Finding("threads", f"{threads} on {counted(cores, 'core')}", "; ".join(notes))


def _waiting(*, spins: bool) -> str:
    """How the threads of a step wait for one another."""
    if step_threads.openmp_spins():
        return "OpenMP's threads spin while they wait, which is slow beside other work: set GOMP_SPINCOUNT=0"
    if (reason := step_threads.why_not()) is not None:
        return f"they sleep between two operators: {reason}"
    if not spins:
        return "they sleep between two operators, as there are not enough cores"
    return "they spin between two operators of a step, for microseconds, and sleep between steps"


def _support(engine: LLMEngine, trial: TrialResult) -> Finding:
    image = f", {trial.image_tokens} of images among them" if trial.image_tokens else ""
    value = (
        f"transformers' layers, measured over {trial.num_tokens} tokens{image}: logits within "
        f"{trial.error_generated:.0e} of its cached generation and {trial.error_full:.0e} of a full forward pass"
    )
    lost = "layers carry states: no prefix cache, no speculation; a preempted request is computed anew"
    return Finding("support", value, lost if engine.model_runner.model.has_states else "")


def _sampling_defaults(engine: LLMEngine, defaults: SamplingParams) -> Finding:
    found, used = engine.checkpoint.generation_defaults, engine.generation_defaults
    set_values = defaults.model_dump(exclude_defaults=True) | {"temperature": defaults.temperature}
    value = ", ".join(f"{name} {number}" for name, number in sorted(set_values.items()))
    value += ", which is greedy" if defaults.is_greedy else ""
    note = "for requests without sampling parameters"
    if used:
        note += "; from generation_config.json among others, which generation_config='vllm' ignores"
    elif found:
        note += f"; generation_config='vllm' ignores what generation_config.json sets: {', '.join(found)}"
    if ignored := ignored_names(engine.config, engine.checkpoint):
        note += f"; without effect, set there too: {', '.join(ignored)}"
    return Finding("sampling defaults", value, note)


def _weights(engine: LLMEngine) -> Finding:
    linears = [module for module in engine.model_runner.model.modules() if isinstance(module, Linear)]
    layouts = Counter(module.layout for module in linears)
    counts = ", ".join(f"{count} {layout}" for layout, count in layouts.most_common())
    note = ""
    if layouts["plain"]:
        note = "plain ones are too small to gain by packing, or torch's own product in their type is the fastest"
        note = "a GPU needs no packing" if engine.model_runner.device.type == "cuda" else note
    if any(module.panels is not None for module in linears):
        note = "; ".join(filter(None, [_panels_in(engine), note]))
    value = f"{str(engine.model_runner.dtype).removeprefix('torch.')}, linear layers: {counts}"
    return Finding("weights", value, note)


def _panels_in(engine: LLMEngine) -> str:
    """Where the panels of weights lie."""
    if (file := engine.model_runner.model.packed_file) is not None:
        size = f" ({file.stat().st_size // _MIB} MiB)" if file.exists() else ", which is removed meanwhile"
        return f"panels are mapped from {file}{size}"
    why = ": engine.packed_weights_bytes is 0" if not engine.config.packed_weights_bytes else ""
    return f"panels are in this process's own memory, and in no file{why}"


def _products(engine: LLMEngine) -> Iterator[Finding]:
    """Instructions for products with panels, where there is a choice."""
    dtype = torch.int8 if engine.config.quantization == "int8" else engine.model_runner.dtype
    if dtype not in (torch.bfloat16, torch.int8) or engine.model_runner.device.type != "cpu" or not is_wide(dtype):
        return
    is_fixed = dtype == torch.bfloat16 and engine.config.deterministic
    choice = product_choice.choose(dtype, deterministic=engine.config.deterministic)
    notes = [f"no AMX tiles: {reason}"] if (reason := tiles.why_not()) is not None else []
    if not (is_fixed and reason is None) and not (dtype == torch.int8 and reason is not None):
        notes.append(f"measured on this machine, recorded in {product_choice.record_path()}")
    yield Finding("products", product_choice.describe(dtype, choice), "; ".join(notes))


def _attention(engine: LLMEngine) -> Finding:
    backend = engine.model_runner.attention
    if isinstance(backend, SdpaAttention):
        return Finding("attention", f"{backend.name}: slow", f"what is faster is missing: {backend.reason}")
    note = "compiled for this CPU" if isinstance(backend, PagedCpuAttention) else "held against plain torch at start"
    return Finding("attention", backend.name, note)


def _step_limits(engine: LLMEngine) -> Finding:
    config, limits = engine.config, engine.model_runner.limits
    value = f"{limits.max_num_seqs} sequences, {limits.max_num_batched_tokens:,} tokens"
    if config.num_speculative_tokens:
        value += f", drafts up to {limits.max_draft_step_tokens} tokens"
    names = ("max_num_seqs", "max_num_batched_tokens")
    chosen, given = (
        [name for name in names if (getattr(config, name) is None) is is_chosen] for is_chosen in (True, False)
    )
    notes = [f"by device and model: {', '.join(chosen)}"] if chosen else []
    notes += [f"set: {', '.join(given)}"] if given else []
    return Finding("step", value, "; ".join(notes))


def _layers(engine: LLMEngine) -> Finding:
    weight = engine.model_runner.model.embed_tokens
    if (reason := fused.why_not(weight.device, weight.dtype)) is not None:
        return Finding("layers", "torch's operators: slow", f"the fused Triton kernels cannot be used: {reason}")
    return Finding("layers", "fused Triton kernels", "held against plain torch at start")


def _sampling(engine: LLMEngine) -> Iterator[Finding]:
    if engine.model_runner.device.type != "cuda":
        return
    if (reason := engine.sampler.kernels.reason) is None:
        yield Finding("sampling", "Triton kernels", "held against plain torch at start")
    else:
        yield Finding("sampling", "torch's operators, which sort the vocabulary: slow", reason)


def _graphs(engine: LLMEngine) -> Finding:
    graphs, reason = engine.model_runner.graphs, engine.model_runner.why_no_graphs
    if graphs is None:
        return Finding("CUDA graphs", "none", reason or "the engine is closed")
    sizes = ", ".join(map(str, graphs.sizes))
    longest = graphs.contexts[graphs.sizes[-1]][-1]
    beyond = "" if longest >= engine.max_model_len else "; steps with a longer one start their kernels one by one"
    return Finding("CUDA graphs", f"steps of up to {sizes} tokens", f"contexts of up to {longest:,}{beyond}")


def _memory(engine: LLMEngine) -> Iterator[Finding]:
    runner, blocks = engine.model_runner, engine.scheduler.blocks
    size = sum(layer.nbytes for layer in runner.kv_caches) // _MIB
    tokens = blocks.num_blocks * blocks.block_size
    kind = str(runner.kv_caches[0].dtype).removeprefix("torch.")
    yield Finding("KV cache", f"{size} MiB: {tokens:,} tokens in blocks of {blocks.block_size}, {kind}")
    longest = engine.max_model_len
    yield Finding("context", f"{longest:,} tokens, prompt and output", f"{tokens / longest:.1f} of the longest at once")
    processor = engine.processor
    if processor is not None:
        encoder = processor.encoder
        image = encoder.num_vision_tokens * encoder.width * encoder.dtype.itemsize
        budget = engine.config.embedding_cache_bytes
        value = f"{budget // _MIB} MiB: {budget // image:,} images"
        yield Finding("embedding cache", value, f"{image:,} bytes an image")


def _linears(engine: LLMEngine, rows: int, sampled: int, seconds: float) -> float:
    """Seconds that all linear layers of a step of ``rows`` tokens take, the fastest of some rounds; the head computes
    the ``sampled`` ones.
    """
    runner = engine.model_runner
    layers = [module for module in runner.model.modules() if isinstance(module, Linear)]
    inputs = {
        layer.in_features: torch.randn(rows, layer.in_features).to(runner.dtype).to(runner.device) for layer in layers
    }
    counts = [sampled if layer is runner.model.lm_head else rows for layer in layers]
    fastest, until = float("inf"), time.perf_counter() + seconds
    with torch.inference_mode():
        while fastest == float("inf") or time.perf_counter() < until:
            started = time.perf_counter()
            with step_threads.awake() if runner.device.type == "cpu" else nullcontext():
                for layer, count in zip(layers, counts, strict=True):
                    layer(inputs[layer.in_features][:count])
            if runner.device.type == "cuda":
                torch.cuda.synchronize(runner.device)
            fastest = min(fastest, time.perf_counter() - started)
    return fastest


def _requests(engine: LLMEngine, count: int, length: int, max_tokens: int, seed: int) -> list[str]:
    """Queue requests of random tokens, unlike any earlier ones; returns their ids."""
    drawn = random.Random(f"{time.perf_counter_ns()} {seed}")
    vocab = min(engine.model_runner.model.config.vocab_size, len(engine.tokenizer))
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    tokens = [token for token in range(vocab) if token != engine.model_runner.image_token_id]
    return [engine.add_request(drawn.choices(tokens, k=length), params) for _ in range(count)]


def _prefill(engine: LLMEngine, length: int, seconds: float) -> float:
    """Prompt tokens computed in a second, after a round that warms up."""
    rounds, spent = -1, 0.0
    while spent < seconds:
        rounds += 1
        _requests(engine, _PROMPTS, length, 1, rounds)
        started = time.perf_counter()
        while engine.has_unfinished():
            engine.step()
        spent += time.perf_counter() - started if rounds else 0.0
    return rounds * _PROMPTS * length / spent


def _decode(engine: LLMEngine, rows: int, length: int, seconds: float) -> float:
    """Tokens decoded in a second by ``rows`` requests at once: the fastest step counts, as for the linear layers.

    Without drafts: an accepted one costs no step, so that the bound would not hold.
    """
    prompt_lookup = engine.scheduler.prompt_lookup
    max_drafts, prompt_lookup.max_drafts = prompt_lookup.max_drafts, 0
    names = _requests(engine, rows, length, engine.max_model_len - length - 1, rows)
    while any(sequence.num_output_tokens < 2 for sequence in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    fastest, until = float("inf"), time.perf_counter() + seconds
    while fastest == float("inf") or (time.perf_counter() < until and engine.has_unfinished()):
        before = engine.stats().generation_tokens
        started = time.perf_counter()
        engine.step()
        took, tokens = time.perf_counter() - started, engine.stats().generation_tokens - before
        fastest = min(fastest, took / tokens) if tokens else fastest
    for name in names:
        engine.abort(name)
    while engine.has_unfinished():
        engine.step()
    prompt_lookup.max_drafts = max_drafts
    return 1.0 / fastest
