"""All that an engine on a GPU runs in Triton, at once and overlapped: it answers as an engine on a CPU does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import triton_interpreter
from checkpoints import make_llava, make_qwen3, make_qwen_vl
from engine_parts import drain, greedy, noise_image
from triton_interpreter import DEVICE

from nanovllm.engine import kernels, llm_engine
from nanovllm.engine.execution import loading, model_runner
from nanovllm.engine.layers import fused
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

if (reason := triton_interpreter.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from nanovllm.engine.attention.packed import TritonPackedAttention
from nanovllm.engine.attention.triton_paged import TritonAttention
from nanovllm.engine.sampling.kernel_selection import triton_kernels
from nanovllm.vision.encoders.packed_attention import attend_packed

BLOCK, BLOCK_BYTES = 16, 16_384
OPTIONS = {"max_num_batched_tokens": 23, "num_speculative_tokens": 3, "dtype": "float32", "block_size": BLOCK}
COMMON = "the quick brown fox total receipt hello world"
RANDOM = {"temperature": 1.2, "top_p": 0.9, "top_k": 40, "ignore_eos": True}
TEXTS: list[tuple[str, SamplingParams]] = [
    (COMMON, greedy(10, logprobs=1)),
    (f"{COMMON} {COMMON} hello", greedy(8)),
    (f"{COMMON} again", SamplingParams(seed=3, n=2, max_tokens=8, **RANDOM)),
    ("total", SamplingParams(temperature=0.0, regex="(ab|c)*d", max_tokens=8)),
    ("receipt", SamplingParams(seed=4, min_p=0.02, repetition_penalty=1.3, stop=["e"], max_tokens=8, **RANDOM)),
]


def use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on engines compute with every Triton kernel of ours and read tokens late, as on a GPU."""
    monkeypatch.setattr(kernels, "missing", lambda: "a GPU has none")
    monkeypatch.setattr(fused, "serves", lambda _: True)
    monkeypatch.setattr(model_runner, "choose_backend", lambda device, dtype, block, *_: TritonAttention(device, block))
    monkeypatch.setattr(model_runner, "choose_kernels", lambda *_: triton_kernels())
    monkeypatch.setattr(llm_engine, "is_asynchronous", lambda _: True)

    def pack(encoder: Any, *_: Any) -> None:
        if encoder is not None and encoder.tower.config.model_type.startswith("qwen"):
            attend_packed(encoder.tower, TritonPackedAttention(DEVICE))

    monkeypatch.setattr(loading, "_choose_tower_attention", pack)


def answer(directory: Path, images: int, **options: Any) -> tuple[list[RequestOutput], LLMEngine]:
    """What requests of all kinds are answered twice, with a warm prefix cache the second time."""
    with LLMEngine(str(directory), device=DEVICE.type, **OPTIONS, **options) as engine:
        outputs = []
        for turn in range(2):
            for number, (prompt, params) in enumerate(TEXTS):
                pictures = [noise_image(number % 2, 60, 40 + 30 * (number % 2))] if number < images else []
                text = prompt + " <|image|>" * len(pictures)
                engine.add_request(text, params, pictures, request_id=f"{turn}-{number}")
            found = drain(engine)
            outputs += [found[f"{turn}-{number}"] for number in range(len(TEXTS))]
        return outputs, engine


def tokens_of(outputs: list[RequestOutput]) -> list[Any]:
    return [[(one.token_ids, one.text, one.finish_reason) for one in output.outputs] for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "images"),
    [
        pytest.param(make_qwen3, 0, id="qwen3"),
        pytest.param(make_llava, 2, id="llava"),
        pytest.param(make_qwen_vl, 2, id="qwen2_5_vl"),
        pytest.param(partial(make_qwen_vl, family="qwen3_vl"), 2, id="qwen3_vl", marks=pytest.mark.proof),
    ],
)
def test_a_gpu_s_engine_answers_as_a_cpu_s(
    make: Callable[[Path], Path], images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make(tmp_path)
    expected, _ = answer(directory, images, kv_cache_bytes=8 << 20)
    use_triton(monkeypatch)
    found, engine = answer(directory, images, kv_cache_bytes=8 * BLOCK_BYTES)
    assert tokens_of(found) == tokens_of(expected)
    stats = engine.stats()
    assert min(stats.num_preemptions, stats.prefix_cache_hits, stats.spec_decode_accepted_tokens) > 0
