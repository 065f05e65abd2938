"""Limits of a step: those that the user sets, else those that fit the device's memory and the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_parts import greedy

from nanovllm.engine.attention.varlen import PagedVarlenAttention
from nanovllm.engine.backends.native import AsyncEngine
from nanovllm.engine.config import EngineConfig
from nanovllm.engine.diagnostics import describe
from nanovllm.engine.execution import kv_cache_size
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.sampling.kernel_selection import SamplingKernels
from nanovllm.engine.scheduling.batch import ScheduledBatch
from nanovllm.engine.step_limits import CPU_LIMITS, Device, ModelCosts, StepLimits, choose_step_limits

GB = 10**9
# Bytes as CUDA tells them, and compute capabilities.
DEVICES = {
    "H200": Device("cuda", 150_109_880_320, (9, 0)),
    "H100": Device("cuda", 85_029_158_912, (9, 0)),
    "A100": Device("cuda", 85_031_714_816, (8, 0)),
    "L40S": Device("cuda", 47_697_362_944, (8, 9)),
    "RTX 4090": Device("cuda", 25_390_809_088, (8, 9)),
    "L4": Device("cuda", 23_580_639_232, (8, 9)),
    "T4": Device("cuda", 15_640_232_960, (7, 5)),
}
# Bytes of weights; keys and values of a token, its hidden state, vocabulary, bytes of a number and context.
MODELS = {
    "Qwen3-0.6B": (1.2 * GB, ModelCosts(28 * 2 * 8 * 128 * 2, 1024 * 2, 151_936, 2, 40_960)),
    "Qwen3-VL-2B": (4.3 * GB, ModelCosts(28 * 2 * 8 * 128 * 2, 2048 * 2, 151_936, 2, 262_144)),
    "Qwen3-8B": (16.4 * GB, ModelCosts(36 * 2 * 8 * 128 * 2, 4096 * 2, 151_936, 2, 40_960)),
    "Qwen3-32B": (65.5 * GB, ModelCosts(64 * 2 * 8 * 128 * 2, 5120 * 2, 151_936, 2, 40_960)),
}


def limits_of(device: str, model: str, **options: object) -> StepLimits:
    weights, costs = MODELS[model]
    config = EngineConfig.from_options("m", options)
    room = int(DEVICES[device].memory * config.gpu_memory_utilization - weights)
    return choose_step_limits(config, DEVICES[device], max(0, room), costs)


@pytest.mark.parametrize(
    ("device", "model", "seats", "tokens", "draft_tokens"),
    [
        ("H200", "Qwen3-0.6B", 256, 8192, 128),
        ("H200", "Qwen3-32B", 256, 8192, 128),
        ("H100", "Qwen3-0.6B", 256, 8192, 128),
        ("H100", "Qwen3-8B", 256, 8192, 128),
        ("H100", "Qwen3-32B", 32, 4096, 128),  # the weights leave 11 GB
        ("A100", "Qwen3-8B", 256, 8192, 64),
        ("L40S", "Qwen3-0.6B", 256, 4096, 64),
        ("L40S", "Qwen3-8B", 128, 4096, 64),
        ("RTX 4090", "Qwen3-0.6B", 128, 4096, 64),
        ("RTX 4090", "Qwen3-VL-2B", 128, 4096, 64),
        ("RTX 4090", "Qwen3-8B", 32, 4096, 64),
        ("L4", "Qwen3-8B", 16, 2048, 64),
        ("T4", "Qwen3-0.6B", 64, 2048, 64),
        ("T4", "Qwen3-8B", 8, 1024, 16),  # which does not fit: the least, and the cache's size refuses it
    ],
)
def test_limits_fit_the_device_and_the_model(
    device: str, model: str, seats: int, tokens: int, draft_tokens: int
) -> None:
    assert limits_of(device, model) == StepLimits(seats, tokens, draft_tokens)


@pytest.mark.parametrize("device", [*DEVICES, "CPU"])
def test_what_the_user_sets_wins_on_every_device(device: str) -> None:
    config = EngineConfig("m", max_num_seqs=1000, max_num_batched_tokens=77)
    limits = choose_step_limits(config, DEVICES.get(device, Device("cpu")), GB, MODELS["Qwen3-0.6B"][1])
    assert (limits.max_num_seqs, limits.max_num_batched_tokens) == (1000, 77)


def test_a_cpu_has_the_limits_that_it_had() -> None:
    assert choose_step_limits(EngineConfig("m"), Device("cpu"), 0, MODELS["Qwen3-8B"][1]) == StepLimits(64, 512, 16)


def test_a_large_vocabulary_takes_seats_where_logits_would_take_the_cache() -> None:
    room, costs = 20 * GB, MODELS["Qwen3-0.6B"][1]

    def chosen(vocab_size: int, *, sorts_logits: bool) -> tuple[int, int]:
        model = replace(costs, vocab_size=vocab_size, sorts_logits=sorts_logits)
        limits = choose_step_limits(EngineConfig("m"), DEVICES["RTX 4090"], room, model)
        return limits.max_num_seqs, limits.max_draft_step_tokens

    assert chosen(32_000, sorts_logits=True) == chosen(600_000, sorts_logits=False) == (128, 64)
    assert chosen(600_000, sorts_logits=True) == (32, 32)


def test_a_small_cache_has_as_many_seats_as_it_holds_requests() -> None:
    assert limits_of("H100", "Qwen3-0.6B", kv_cache_bytes=4 << 30).max_num_seqs == 32
    assert limits_of("H100", "Qwen3-0.6B", kv_cache_bytes=1).max_num_seqs == 8
    assert limits_of("H100", "Qwen3-0.6B", gpu_memory_utilization=0.2).max_num_seqs == 128


def test_float32_without_tensor_cores_has_fewer_drafts() -> None:
    costs = replace(MODELS["Qwen3-0.6B"][1], itemsize=4)
    assert choose_step_limits(EngineConfig("m"), DEVICES["H100"], 70 * GB, costs).max_draft_step_tokens == 32


def test_copied_pages_keep_a_gpu_at_small_steps() -> None:
    costs = replace(MODELS["Qwen3-0.6B"][1], copies_pages=True)
    assert choose_step_limits(EngineConfig("m"), DEVICES["H100"], 70 * GB, costs) == StepLimits(64, 2048, 16)


@pytest.mark.parametrize(
    ("limits", "drafts", "expected"),
    [((4, 512, 16), 8, 16), ((4, 512, 16), 0, 4), ((256, 8192, 128), 8, 256), ((64, 48, 16), 8, 48)],
)
def test_a_step_without_prompts_has_a_token_a_seat_or_drafts(
    limits: tuple[int, int, int], drafts: int, expected: int
) -> None:
    assert StepLimits(*limits).decode_tokens(drafts) == expected


def test_the_engine_asks_the_gpu_for_its_memory_and_what_is_free(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = DEVICES["RTX 4090"]
    properties = SimpleNamespace(total_memory=gpu.memory, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    free = [gpu.memory]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free[0], gpu.memory))
    with LLMEngine(str(text), kv_cache_bytes=1 << 20) as engine:
        model, cuda = engine.model_runner.model, torch.device("cuda", 0)
        sampling = SamplingKernels(reason=None)
        attention = PagedVarlenAttention(torch.device("cpu"), lambda query, *_: query)

        def chosen() -> StepLimits:
            return kv_cache_size.limits_for(EngineConfig("m"), cuda, model, attention, sampling, reserved=GB)

        assert chosen() == StepLimits(128, 4096, 16)  # a checkpoint in float32
        free[0] = 4 * GB  # others have the rest
        assert chosen().max_num_seqs == 128
        free[0] = 3 * GB
        assert chosen() == StepLimits(8, 1024, 16)


async def test_scheduler_admission_and_report_follow_the_chosen_limits(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = StepLimits(5, 100, 40)
    monkeypatch.setattr(kv_cache_size, "choose_step_limits", lambda *_: chosen)
    with LLMEngine(str(text), kv_cache_bytes=8 << 20) as engine:
        scheduler = engine.scheduler
        assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (5, 100)
        assert AsyncEngine(engine).max_num_seqs == 5
        step = next(one for one in describe(engine) if one.subject == "step")
    assert step.value == "5 sequences, 100 tokens, drafts up to 40 tokens"
    assert step.note == "by device and model: max_num_seqs, max_num_batched_tokens"


@pytest.mark.parametrize(("limit", "least"), [(16, 9), (40, 17)])
def test_drafts_fill_a_step_up_to_its_limit(
    limit: int, least: int, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache_size, "choose_step_limits", lambda *_: StepLimits(8, 512, limit))
    with LLMEngine(str(text), kv_cache_bytes=8 << 20) as engine:
        schedule, sizes = engine.scheduler.schedule, [0]

        def counted() -> ScheduledBatch:
            scheduled = schedule()
            if all(row.start for row in scheduled.rows):  # no prompt among them
                sizes.append(sum(row.num_tokens for row in scheduled.rows))
            return scheduled

        monkeypatch.setattr(engine.scheduler, "schedule", counted)
        prompts = [[number + 1] * 3 for number in range(8)]
        engine.generate(prompts, greedy(48, logit_bias={7: 100.0}), use_tqdm=False)  # which is guessed at once
    assert least <= max(sizes) <= limit


def test_the_report_says_what_the_user_set(text: Path) -> None:
    with LLMEngine(str(text), kv_cache_bytes=1 << 20, max_num_seqs=3) as engine:
        step = next(one for one in describe(engine) if one.subject == "step")
    assert step.value == f"3 sequences, 512 tokens, drafts up to {CPU_LIMITS.max_draft_step_tokens} tokens"
    assert step.note == "by device and model: max_num_batched_tokens; set: max_num_seqs"
