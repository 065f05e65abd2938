"""What a GPU's KV cache leaves for everything else, computed on a CPU where only the measuring is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_llava, make_qwen3, make_qwen_vl

from nanovllm.engine.attention.base import AttentionBackend
from nanovllm.engine.attention.sdpa import SdpaAttention
from nanovllm.engine.config import EngineConfig
from nanovllm.engine.execution import kv_cache_size
from nanovllm.engine.execution.cuda_graphs import DecodeGraphs, graph_bytes, graph_shapes
from nanovllm.engine.execution.model_runner import ModelRunner
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.models.decoder import Decoder
from nanovllm.engine.step_limits import StepLimits
from nanovllm.errors import ConfigurationError
from nanovllm.vision.encoders.qwen import NativeEncoder

GIB = 1 << 30
CUDA = torch.device("cuda", 0)
LIMITS = StepLimits(8, 512, 16)
WORLDS: dict[str, Callable[[Path], Path]] = {
    "text": make_qwen3,
    "llava": partial(make_llava, tower="siglip", patch=16, size=64),
    "qwen-vl": partial(make_qwen_vl, family="qwen3_vl"),
}


@pytest.fixture(scope="module", params=list(WORLDS))
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelRunner]:
    directory = WORLDS[request.param](tmp_path_factory.mktemp(request.param))
    with LLMEngine(str(directory), kv_cache_bytes=1 << 20) as engine:
        yield engine.model_runner


def budget(runner: ModelRunner, attention: AttentionBackend, **options: Any) -> int:
    config = EngineConfig("", gpu_memory_utilization=0.75, max_model_len=600)
    return kv_cache_size.kv_cache_bytes(
        config, LIMITS, CUDA, runner.model, attention, runner.sampling, runner.encoder, **options
    )


def of_a_gpu(monkeypatch: pytest.MonkeyPatch, *peaks: int) -> list[Any]:
    """24 GiB, of which 20 are free; what is measured in order takes ``peaks``. Returns what it computed."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 * GIB, 24 * GIB))
    computed: list[Any] = []

    def peak_bytes(_: torch.device, compute: Callable[[], object]) -> int:
        computed.append(compute())
        return peaks[len(computed) - 1]

    monkeypatch.setattr(kv_cache_size, "peak_bytes", peak_bytes)
    return computed


@pytest.mark.parametrize("graphs", [1, 5])
def test_the_cache_leaves_the_largest_of_step_encoder_and_warm_up_beside_what_graphs_keep(
    runner: ModelRunner, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sees, attention = runner.encoder is not None, SdpaAttention(torch.device("cpu"), torch.float32)
    assert isinstance(runner.model, Decoder)
    free = 20 * GIB - 6 * GIB - kv_cache_size._LIBRARY_BYTES
    encoder = [3 * GIB] if sees else []

    computed = of_a_gpu(monkeypatch, 2 * GIB, *encoder)
    assert budget(runner, attention, has_graphs=False, reserved=GIB) == free - GIB - max(2 * GIB, *encoder, 0)
    assert len(computed[0]) == 16  # as many random tokens as drafts may add logits

    computed = of_a_gpu(monkeypatch, 2 * GIB, *encoder, graphs * GIB)
    beside = graph_bytes(runner.model, attention, graph_shapes(attention, 16, 600), 8)
    # A graph is warmed up in the memory of other steps, while the pool keeps what the largest one took.
    largest = max(2 * GIB, *encoder, graphs * GIB)
    assert budget(runner, attention, has_graphs=True, reserved=0) == free - largest - graphs * GIB - beside
    assert computed[-1].shape == (16, runner.model.config.vocab_size)


def test_graphs_take_no_more_beside_their_pool_than_is_counted(runner: ModelRunner) -> None:
    assert isinstance(runner.model, Decoder)
    attention = SdpaAttention(torch.device("cpu"), torch.float32)
    caches = [attention.allocate(2, *shape, torch.float32) for shape in runner.model.config.kv_shapes]
    limits = {"max_tokens": 16, "max_context": 600, "num_seats": 8}
    graphs = DecodeGraphs(runner.model, attention, caches, lambda compute: compute, spare_block=1, **limits)
    kept = graphs._logits.nbytes + graphs._inputs[16].nbytes + graphs._tables.nbytes
    counted = graph_bytes(runner.model, attention, graph_shapes(attention, 16, 600), 8)
    assert 0 < kept < counted


def test_the_encoder_s_largest_pass_has_as_many_patches_as_any(runner: ModelRunner) -> None:
    encoder = runner.encoder
    if encoder is None:
        return
    embeddings = encoder.embed_largest(600)
    assert encoder.images_encoded == 0
    assert all(embedding.shape[1] == encoder.width for embedding in embeddings)
    if isinstance(encoder, NativeEncoder):
        tokens = sum(map(len, embeddings))
        assert tokens * encoder.tower.config.spatial_merge_size**2 > encoder.batch_patches // 2 or len(embeddings) == 32
        assert max(map(len, embeddings)) <= encoder.num_vision_tokens
        assert len(encoder.embed_largest(4)[0]) == 4  # an image of more tokens than a context fits no request
    else:
        assert len(embeddings) == encoder.batch_size


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (0, r"max_num_batched_tokens=512 at the end of a context of 600 tokens, or sampling for max_num_seqs=8,"),
        (1, "largest images that the encoder takes"),
        (2, r"recorded step of 16 tokens .*lower max_num_seqs=8, or set enforce_eager=True"),
    ],
)
def test_what_does_not_fit_is_named(
    runner: ModelRunner, fails: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if runner.encoder is None and fails == 1:
        return
    measured = [0, 1, 2] if runner.encoder is not None else [0, 2]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 * GIB, 24 * GIB))

    def peak_bytes(*_: object) -> int:
        if measured.pop(0) == fails:
            raise torch.OutOfMemoryError
        return GIB

    monkeypatch.setattr(kv_cache_size, "peak_bytes", peak_bytes)
    attention = SdpaAttention(torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigurationError, match=message):
        budget(runner, attention, has_graphs=True, reserved=0)


def test_a_peak_is_what_torch_takes_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved, peak = [5 * GIB], [9 * GIB]  # 2 GiB of what is reserved are empty, 9 were the peak of a while ago

    def empty_cache() -> None:
        reserved[0] = 3 * GIB

    def reset(_: torch.device) -> None:
        peak[0] = reserved[0]

    def compute() -> None:
        reserved[0] += 4 * GIB
        peak[0] = max(peak[0], reserved[0])

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: reserved[0])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: peak[0])
    assert kv_cache_size.peak_bytes(CUDA, compute) == 4 * GIB
    assert reserved[0] == 3 * GIB
