"""The engine answers what transformers answers: same tokens, same logits, whatever else is in the batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flash_attn_reference
import pytest
import torch
from checkpoints import Family, make_llava, make_qwen3, make_qwen_vl, make_text
from engine_parts import (
    Case,
    RecordingSampler,
    Reference,
    assert_all_same,
    drain,
    draw_cases,
    greedy,
    random_prompt,
    recording_engine,
    step,
)
from safetensors.torch import load_file, save_file

from nanovllm.engine import kernels
from nanovllm.engine.attention.cpu_paged import PagedCpuAttention
from nanovllm.engine.attention.sdpa import SdpaAttention
from nanovllm.engine.attention.varlen import PagedVarlenAttention, flash_attn_kernels
from nanovllm.engine.execution import model_runner
from nanovllm.engine.execution.step_inputs import StepInputs, StepResult
from nanovllm.engine.layers import linear
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import RequestOutput
from nanovllm.errors import ConfigurationError, UnsupportedModel

HEAD_DIM = 32  # of every checkpoint here, so that a KV cache of a number of bytes has as many blocks in each
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}

make_siglip_llava = partial(make_llava, tower="siglip", patch=16, size=64)


def rope(kind: str, **parameters: float) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 1e4, **parameters}


WORLDS: dict[str, Callable[[Path], Path]] = {
    "qwen3": make_qwen3,
    "qwen2": partial(make_text, family="qwen2", hidden_size=4 * HEAD_DIM),
    "llama": partial(make_text, family="llama"),
    "llava-clip-qwen3": make_llava,
    "llava-siglip-qwen2": partial(make_siglip_llava, text="qwen2", hidden_size=4 * HEAD_DIM),
    "llava-siglip-llama": partial(make_siglip_llava, text="llama", vision_feature_layer=[1, -1]),
    "qwen2.5-vl": make_qwen_vl,
    "qwen3-vl": partial(make_qwen_vl, family="qwen3_vl"),
}
SEE = ("llava", "qwen2.5-vl", "qwen3-vl")


@pytest.fixture(scope="module", params=list(WORLDS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Case]]:
    """A checkpoint and 16 cases of it; with images 0, 1 and 3 a prompt."""
    directory = WORLDS[request.param](tmp_path_factory.mktemp(request.param))
    sees = request.param.startswith(SEE)
    cases = draw_cases(Reference(directory, sees=sees), [0, 1, 3, 1] * 4 if sees else [0] * 16)
    return directory, {f"case-{number}": case for number, case in enumerate(cases)}


def add(engine: LLMEngine, name: str, case: Case) -> None:
    engine.add_request(case.prompt, greedy(), images=case.images, request_id=name)


def test_each_request_alone_equals_transformers(world: tuple[Path, dict[str, Case]]) -> None:
    directory, cases = world
    engine = recording_engine(directory)
    outputs: dict[str, RequestOutput] = {}
    for name, case in cases.items():
        add(engine, name, case)
        drain(engine, outputs)
    assert_all_same(engine, cases, outputs)
    assert engine.stats().num_preemptions == 0


def test_drafts_of_what_was_answered_before_change_nothing(world: tuple[Path, dict[str, Case]]) -> None:
    directory, cases = world
    engine = recording_engine(directory)
    for _ in range(2):
        before = engine.stats()
        for name, case in cases.items():
            add(engine, name, case)
            assert_all_same(engine, {name: case}, drain(engine))
    after = engine.stats()
    accepted = after.spec_decode_accepted_tokens - before.spec_decode_accepted_tokens
    assert accepted > (after.generation_tokens - before.generation_tokens) // 4
    assert accepted < after.spec_decode_draft_tokens - before.spec_decode_draft_tokens  # and some are taken back


def test_sixteen_that_join_and_leave_at_different_steps_equal_transformers(world: tuple[Path, dict[str, Case]]) -> None:
    directory, cases = world
    engine = recording_engine(directory)
    outputs: dict[str, RequestOutput] = {}
    for name, case in cases.items():
        add(engine, name, case)
        for _ in range(3):
            step(engine, outputs)
    assert len(engine.scheduler.running) > 8
    assert_all_same(engine, cases, drain(engine, outputs))


def use_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> type:
    """Make engines attend as on another machine; returns the class of backend that they then have."""
    if name == "flash-attn":
        monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_reference)
        backend = PagedVarlenAttention(torch.device("cpu"), flash_attn_kernels())
        monkeypatch.setattr(model_runner, "choose_backend", lambda *_: backend)
        return PagedVarlenAttention
    if name == "torch":
        monkeypatch.setattr(kernels, "missing", lambda: "this test does without")
    return PagedCpuAttention if kernels.missing() is None else SdpaAttention


@pytest.mark.parametrize(
    ("tokens_a_step", "backend"), [(16, "kernels"), (23, "kernels"), (23, "torch"), (23, "flash-attn")]
)
def test_prompts_computed_in_chunks_equal_transformers(
    world: tuple[Path, dict[str, Case]], tokens_a_step: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, cases = world
    expected = use_backend(backend, monkeypatch)
    engine = recording_engine(directory, max_num_batched_tokens=tokens_a_step)
    assert isinstance(engine.model_runner.attention, expected)
    for name, case in cases.items():
        add(engine, name, case)
    chunks, forward = [], engine.model_runner.forward

    def count_chunks(inputs: StepInputs) -> StepResult:
        chunks.extend(row.num_tokens for row in inputs.rows if not row.is_sampled)
        return forward(inputs)

    monkeypatch.setattr(engine.model_runner, "forward", count_chunks)
    assert_all_same(engine, cases, drain(engine))
    assert len(chunks) >= 8
    assert 1 <= max(chunks) <= tokens_a_step


def test_a_warm_prefix_cache_changes_nothing(world: tuple[Path, dict[str, Case]]) -> None:
    directory, cases = world
    engine = recording_engine(directory)
    for name, case in cases.items():
        add(engine, name, case)
    drain(engine)
    encoded = engine.stats().encoder_images
    assert isinstance(engine.sampler, RecordingSampler)
    engine.sampler.logits.clear()
    for name, case in cases.items():
        add(engine, name, case)
    outputs = drain(engine)
    assert_all_same(engine, cases, outputs)
    size = engine.scheduler.blocks.block_size
    for output in outputs.values():
        assert output.usage.cached_tokens == (output.usage.input_tokens - 1) // size * size
    assert engine.stats().encoder_images == encoded


def test_preempted_requests_equal_transformers(world: tuple[Path, dict[str, Case]]) -> None:
    directory, cases = world
    engine = recording_engine(directory, kv_cache_bytes=40 * 16 * 2 * 2 * HEAD_DIM * 2 * 4)
    assert engine.scheduler.blocks.num_blocks == 40
    for name, case in cases.items():
        add(engine, name, case)
    outputs = drain(engine)
    assert engine.stats().num_preemptions > 0
    assert_all_same(engine, cases, outputs)


def check_some(directory: Path, *, sees: bool, **options: Any) -> None:
    reference = Reference(directory, sees=sees)
    drawn = draw_cases(reference, [0, 1, 3] if sees else [0, 0], max_tokens=12)
    engine = recording_engine(directory, **options)
    for number, case in enumerate(drawn):
        engine.add_request(case.prompt, greedy(12), images=case.images, request_id=str(number))
    assert_all_same(engine, {str(number): case for number, case in enumerate(drawn)}, drain(engine))


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_sharded_text_checkpoints_load(tmp_path: Path, tie_word_embeddings: bool) -> None:
    make_qwen3(tmp_path, max_shard_size="100KB", tie_word_embeddings=tie_word_embeddings)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_some(tmp_path, sees=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_run_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    make_qwen3(tmp_path / "text", dtype=dtype)
    check_some(tmp_path / "text", sees=False)
    make_llava(tmp_path / "llava", dtype=dtype)
    check_some(tmp_path / "llava", sees=True)


def test_sharded_tied_siglip_checkpoints_load(tmp_path: Path) -> None:
    make_llava(tmp_path, tower="siglip", patch=16, size=64, max_shard_size="100KB", tie_word_embeddings=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_some(tmp_path, sees=True)


FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "llama-attention-bias": {"family": "llama", "attention_bias": True},
    "llama-mlp-bias": {"family": "llama", "mlp_bias": True},
    "llama-own-head-dim": {"family": "llama", "head_dim": 8},
    "llama-rope-llama3": {"family": "llama", "rope_parameters": rope("llama3", **LLAMA3)},
    "qwen3-rope-linear": {"family": "qwen3", "rope_parameters": rope("linear", factor=4.0)},
    "qwen3-attention-bias": {"family": "qwen3", "attention_bias": True},
    "qwen2-rope-yarn": {"family": "qwen2", "rope_parameters": rope("yarn", **YARN)},
    "qwen2-rope-dynamic": {"family": "qwen2", "rope_parameters": rope("dynamic", factor=4.0)},
}


@pytest.mark.parametrize("options", list(FAMILY_OPTIONS.values()), ids=list(FAMILY_OPTIONS))
def test_what_a_family_leaves_to_its_checkpoints_equals_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    make_text(tmp_path, **options)
    check_some(tmp_path, sees=False)


EXTENDED: dict[str, dict[str, Any]] = {
    # As the model card of Qwen2.5 has it, of Qwen3, whose own positions are more than it was trained on, of Vicuna 16k.
    "qwen2.5": {"family": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "qwen3": {
        "family": "qwen3",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    },
    "vicuna": {"family": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", list(EXTENDED))
def test_a_scaling_of_the_model_card_extends_the_context_and_equals_transformers_there(
    tmp_path: Path, name: str
) -> None:
    options = dict(EXTENDED[name])
    scaling = options.pop("rope_scaling")
    make_text(tmp_path, max_position_embeddings=32, **options)
    config = json.loads((tmp_path / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": theta, "rope_scaling": scaling}))
    longest = 96 if name == "qwen3" else 128
    assert recording_engine(tmp_path).max_model_len == longest
    prompt = random_prompt(1, 12)
    case = Reference(tmp_path, sees=False).answer(prompt, max_tokens=40)
    for max_model_len in (None, 90):
        engine = recording_engine(tmp_path, max_model_len=max_model_len)
        engine.add_request(prompt, greedy(40), request_id="it")
        outputs = drain(engine)
        assert outputs["it"].usage.input_tokens + 40 > 64
        assert_all_same(engine, {"it": case}, outputs)
    with pytest.raises(ConfigurationError, match=f"max_model_len={longest + 1}, but the model's positions end at"):
        recording_engine(tmp_path, max_model_len=longest + 1)


def test_a_scaling_of_the_model_card_extends_qwen_vl_too(tmp_path: Path) -> None:
    make_qwen_vl(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config["text_config"]
    text["max_position_embeddings"] = 64
    text["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert recording_engine(tmp_path).max_model_len == 256
    check_some(tmp_path, sees=True)


def test_a_sliding_window_is_full_attention_up_to_its_length_and_refused_beyond(tmp_path: Path) -> None:
    make_text(tmp_path, family="qwen2", use_sliding_window=True, sliding_window=256, max_window_layers=1)
    with pytest.raises(UnsupportedModel, match=r"sliding_window=256 .* max_model_len=2048; up to max_model_len=256"):
        recording_engine(tmp_path)
    check_some(tmp_path, sees=False, max_model_len=256)


def test_stored_rotary_frequencies_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    make_text(tmp_path, family="llama")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(HEAD_DIM // 2)
    save_file(tensors, file, metadata={"format": "pt"})
    check_some(tmp_path, sees=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_half_precision_is_as_near_to_float32_as_that_of_transformers(
    tmp_path: Path, family: Family, dtype: torch.dtype
) -> None:
    make_text(tmp_path, family=family)
    engine = recording_engine(tmp_path, dtype=str(dtype).removeprefix("torch."))
    exact = Reference(tmp_path, sees=False)
    rounded = Reference(tmp_path, sees=False, dtype=dtype)
    ours, theirs = [], []
    for seed in range(8):
        prompt = random_prompt(seed, 12)
        engine.add_request(prompt, greedy(1), request_id=str(seed))
        drain(engine)
        assert isinstance(engine.sampler, RecordingSampler)
        expected = exact.answer(prompt, max_tokens=1).logits
        ours.append((engine.sampler.logits[str(seed)][0].float() - expected[0]).abs().mean())
        theirs.append((rounded.answer(prompt, max_tokens=1).logits[0].float() - expected[0]).abs().mean())
    assert 0 < sum(ours) <= 1.2 * sum(theirs)


@pytest.mark.parametrize("by_our_kernel", [True, False])
def test_wide_checkpoints_whose_weights_are_packed_equal_transformers(
    by_our_kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_our_kernel:
        monkeypatch.setattr(linear, "has_panels", lambda *_: False)
    make_qwen3(tmp_path, hidden_size=768, num_heads=8, head_dim=64, num_layers=1, tie_word_embeddings=True)
    engine = LLMEngine(str(tmp_path), kv_cache_bytes=1 << 20)
    modules = engine.model_runner.model.modules()
    layouts = [module.layout for module in modules if isinstance(module, linear.Linear)]
    assert layouts.count("panels") + layouts.count("packed") == 5 or not torch.backends.mkldnn.is_available()
    check_some(tmp_path, sees=False)


LAYOUTS = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


@pytest.mark.parametrize("wanted", ["old", "new"])
def test_both_layouts_of_llava_tensor_names_load(tmp_path: Path, wanted: str) -> None:
    make_llava(tmp_path)
    file = tmp_path / "model.safetensors"
    changes = LAYOUTS if wanted == "new" else {new: old for old, new in LAYOUTS.items()}
    renamed = {}
    for name, tensor in load_file(file).items():
        prefix = next((prefix for prefix in changes if name.startswith(prefix)), None)
        renamed[name if prefix is None else changes[prefix] + name[len(prefix) :]] = tensor
    assert all(name.startswith(tuple(changes.values())) for name in renamed)
    save_file(renamed, file, metadata={"format": "pt"})
    check_some(tmp_path, sees=True)


def test_end_tokens_come_from_the_generation_config(tmp_path: Path) -> None:
    make_qwen3(tmp_path)
    tokens = Reference(tmp_path, sees=False).answer("hello", max_tokens=8).token_ids
    config = {"eos_token_id": [tokens[5], tokens[3]]}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    engine = recording_engine(tmp_path)
    output = engine.generate("hello", greedy(8).model_copy(update={"ignore_eos": False}), use_tqdm=False)[0]
    first = min(tokens.index(token) for token in config["eos_token_id"])
    assert output.token_ids == tokens[: first + 1]
    assert output.finish_reason == "stop"
