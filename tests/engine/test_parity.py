"""The engine answers what transformers answers: same tokens, same logits, whatever else is in the batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import make_llava, make_qwen3
from engine_parts import (
    Case,
    RecordingSampler,
    Reference,
    assert_all_same,
    drain,
    draw_cases,
    greedy,
    recording_engine,
    step,
)
from safetensors.torch import load_file, save_file

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import RequestOutput


@pytest.fixture(scope="module", params=["text", "llava"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Case]]:
    """A checkpoint and 16 cases of it; with images 0, 1 and 3 a prompt."""
    directory = tmp_path_factory.mktemp(request.param)
    is_llava = request.param == "llava"
    (make_llava if is_llava else make_qwen3)(directory)
    cases = draw_cases(Reference(directory, is_llava=is_llava), [0, 1, 3, 1] * 4 if is_llava else [0] * 16)
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


@pytest.mark.parametrize("cpu_kernels", [True, False], ids=["kernel", "sdpa"])
def test_prompts_computed_in_chunks_equal_transformers(world: tuple[Path, dict[str, Case]], cpu_kernels: bool) -> None:
    directory, cases = world
    engine = recording_engine(directory, max_num_batched_tokens=23, cpu_kernels=cpu_kernels)
    for name, case in cases.items():
        add(engine, name, case)
    assert_all_same(engine, cases, drain(engine))


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
    engine = recording_engine(directory, kv_cache_bytes=40 * 16 * 2 * 2 * 32 * 2 * 4)
    assert engine.scheduler.blocks.num_blocks == 40
    for name, case in cases.items():
        add(engine, name, case)
    outputs = drain(engine)
    assert engine.stats().num_preemptions > 0
    assert_all_same(engine, cases, outputs)


def check_some(directory: Path, *, is_llava: bool) -> None:
    reference = Reference(directory, is_llava=is_llava)
    drawn = draw_cases(reference, [0, 1, 3] if is_llava else [0, 0], max_tokens=12)
    engine = recording_engine(directory)
    for number, case in enumerate(drawn):
        engine.add_request(case.prompt, greedy(12), images=case.images, request_id=str(number))
    assert_all_same(engine, {str(number): case for number, case in enumerate(drawn)}, drain(engine))


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_sharded_text_checkpoints_load(tmp_path: Path, tie_word_embeddings: bool) -> None:
    make_qwen3(tmp_path, max_shard_size="100KB", tie_word_embeddings=tie_word_embeddings)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_some(tmp_path, is_llava=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_run_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    make_qwen3(tmp_path / "text", dtype=dtype)
    check_some(tmp_path / "text", is_llava=False)
    make_llava(tmp_path / "llava", dtype=dtype)
    check_some(tmp_path / "llava", is_llava=True)


def test_sharded_tied_siglip_checkpoints_load(tmp_path: Path) -> None:
    make_llava(tmp_path, tower="siglip", patch=16, size=64, max_shard_size="100KB", tie_word_embeddings=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check_some(tmp_path, is_llava=True)


def test_wide_checkpoints_whose_weights_are_packed_equal_transformers(tmp_path: Path) -> None:
    make_qwen3(tmp_path, hidden_size=768, num_heads=8, head_dim=64, num_layers=1, tie_word_embeddings=True)
    engine = LLMEngine(str(tmp_path), kv_cache_bytes=1 << 20)
    packed = [module for module in engine.model_runner.model.modules() if getattr(module, "is_packed", False)]
    assert len(packed) == 5 or not torch.backends.mkldnn.is_available()
    check_some(tmp_path, is_llava=False)


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
    check_some(tmp_path, is_llava=True)


def test_end_tokens_come_from_the_generation_config(tmp_path: Path) -> None:
    make_qwen3(tmp_path)
    tokens = Reference(tmp_path, is_llava=False).answer("hello", max_tokens=8).token_ids
    config = {"eos_token_id": [tokens[5], tokens[3]]}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    engine = recording_engine(tmp_path)
    output = engine.generate("hello", greedy(8).model_copy(update={"ignore_eos": False}), use_tqdm=False)[0]
    first = min(tokens.index(token) for token in config["eos_token_id"])
    assert output.token_ids == tokens[: first + 1]
    assert output.finish_reason == "stop"
