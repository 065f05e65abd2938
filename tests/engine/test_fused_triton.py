"""The fused Triton kernels of a layer against torch's operators: in Triton's interpreter, or on a GPU if there is one.

test_attention_triton.py runs the engine on them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tape
import torch
import triton_interpreter
from checkpoints import make_llava, make_qwen_vl, make_text
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton_interpreter import DEVICE

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.engine import kernels
from nanovllm.engine.attention.base import AttentionBackend, AttentionBatch, SlotAttention
from nanovllm.engine.attention.sdpa import SdpaAttention
from nanovllm.engine.attention.selection import Heads
from nanovllm.engine.attention.varlen import PagedVarlenAttention
from nanovllm.engine.layers import fused, token_ops
from nanovllm.engine.layers.token_ops import CacheSlots
from nanovllm.engine.models.decoder import Decoder
from nanovllm.engine.models.registry import load_text_model

if (reason := triton_interpreter.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from nanovllm.engine.attention.triton_paged import TritonAttention
from nanovllm.engine.kernels import norm_triton, paged_triton, rotary_triton, silu_triton

EPS = 1e-6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Single tokens, a first chunk, and chunks that begin and end within pages.
MIXED = AttentionBatch([1, 1, 3, 5], [1, 18, 3, 21], [[3], [0, 5], [1], [4, 2]])
DECODE = AttentionBatch([1, 1], [2, 20], [[3], [0, 5]])


OTHERS = PagedVarlenAttention(DEVICE, lambda query, *_: query, 16)
"""flash-attn's layout of the cache, without flash-attn."""


@pytest.fixture
def without_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "missing", lambda: "a GPU has none")


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def strided(x: Tensor) -> Tensor:
    """The same rows, with others between them that are no numbers."""
    wide = torch.full((len(x), 3, *x.shape[1:]), float("nan"), dtype=x.dtype, device=x.device)
    wide[:, 1] = x
    return wide[:, 1]


def assert_same_rounding(found: Tensor, expected: Tensor) -> None:
    """Equal but for values that a sum in another order has put on the other side of half a unit in the last place."""
    assert found.dtype == expected.dtype
    unit = torch.finfo(found.dtype).eps
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=16 * unit, atol=16 * unit)
    else:
        assert float((found != expected).float().mean()) <= 0.01
        torch.testing.assert_close(found, expected, rtol=2 * unit, atol=4 * unit)


def poisoned(attention: SlotAttention, heads: Heads, dtype: torch.dtype) -> tuple[Tensor, CacheSlots]:
    """A cache that nobody wrote to, and where the mixed rows go."""
    assert isinstance(attention, TritonAttention | PagedVarlenAttention)
    cache = attention.allocate(6, heads.num_kv, heads.dim, dtype).fill_(float("nan"))
    return cache, attention.slots(cache, attention.metadata(MIXED))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "has_norm", "layout"),
    [
        (Heads(6, 2, 24), True, "Triton's"),
        (Heads(14, 2, 64), False, "Triton's"),
        (Heads(2, 2, 80), False, "flash-attn's"),
        (Heads(4, 2, 128), True, "flash-attn's"),
        (Heads(3, 1, 256), True, "Triton's"),
    ],
    ids=str,
)
def test_heads_are_rotated_and_written_as_by_torch_s_operators(
    heads: Heads, has_norm: bool, layout: str, dtype: torch.dtype, draw: Any, without_cpu_kernels: None
) -> None:
    attention = TritonAttention(DEVICE) if layout == "Triton's" else OTHERS
    tokens, rotated = sum(MIXED.query_lens), heads.num + heads.num_kv
    qkv = strided(draw(tokens, rotated + heads.num_kv, heads.dim, dtype=dtype))
    norm = 1 + 0.1 * draw(rotated, heads.dim, dtype=dtype) if has_norm else None
    angles = draw(tokens, 1, heads.dim // 2)
    table = torch.stack((angles.cos().repeat(1, 1, 2), torch.cat((-angles.sin(), angles.sin()), -1)), 1).to(dtype)
    rotary = table[:, 0], table[:, 1]
    expected_cache, destination = poisoned(attention, heads, dtype)
    expected = token_ops.rotate_and_write(qkv, norm, EPS, rotary, destination)
    cache, destination = poisoned(attention, heads, dtype)
    query = rotary_triton.rotate_and_write(qkv, norm, EPS, *rotary, *destination)
    assert_same_rounding(query, expected)
    # Slots that are nobody's stay as they were.
    assert torch.equal(cache.isnan(), expected_cache.isnan())
    assert int(cache.isnan().logical_not().sum()) == 2 * tokens * heads.num_kv * heads.dim
    assert_same_rounding(cache.nan_to_num(), expected_cache.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [96, 1000, 4096])
def test_the_residual_takes_the_update_and_its_norm_is_torch_s(
    size: int, dtype: torch.dtype, draw: Any, without_cpu_kernels: None
) -> None:
    residual, update = (strided(draw(5, size, dtype=dtype)) for _ in range(2))
    weight = 1 + 0.1 * draw(size, dtype=dtype)
    expected = (residual + update).float()
    output = norm_triton.add_rms_norm(residual, update, weight, EPS)
    assert torch.equal(residual, expected.to(dtype))
    # As torch's own kernel on CUDA does it: the factor and the weight in one rounding.
    factor = (expected.square().mean(-1, keepdim=True) + EPS).rsqrt()
    assert_same_rounding(output, (expected * factor * weight).to(dtype))
    before = residual.clone()
    assert torch.equal(norm_triton.add_rms_norm(residual, None, weight, EPS), output)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [72, 1500])
def test_the_gate_is_rounded_as_by_torch_s_operators(
    size: int, dtype: torch.dtype, draw: Any, without_cpu_kernels: None
) -> None:
    gate_up = strided(4 * draw(4, 2 * size, dtype=dtype))
    assert_same_rounding(silu_triton.gated_silu(gate_up), token_ops.gated_silu(gate_up))


def test_steps_without_rows_launch_nothing(draw: Any) -> None:
    _, destination = poisoned(TritonAttention(DEVICE), Heads(2, 1, 16), torch.float32)
    nowhere = CacheSlots(destination.keys, destination.values, destination.slots[:0])
    none = draw(0, 4, 16)
    assert rotary_triton.rotate_and_write(none, None, EPS, none[:, :1], none[:, :1], *nowhere).shape == (0, 2, 16)
    assert norm_triton.add_rms_norm(draw(0, 64), draw(0, 64), draw(64), EPS).shape == (0, 64)
    assert silu_triton.gated_silu(draw(0, 64)).shape == (0, 32)


# --- The decision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_trial_finds_the_kernels_right(dtype: torch.dtype) -> None:
    assert fused.trial(DEVICE, dtype) <= fused.TOLERANCES[dtype] / 2


def _breaks(error: Exception) -> Callable[..., float]:
    def trial(*_: Any) -> float:
        raise error

    return trial


@pytest.mark.parametrize(
    ("trial", "expected"),
    [
        (lambda *_: 0.5, "their numbers are off by 0.5"),
        (lambda *_: float("nan"), "their numbers are off by nan"),
        (_breaks(ModuleNotFoundError("", name="triton")), "triton is not installed"),
        (_breaks(RuntimeError("no kernel image")), "RuntimeError: no kernel image"),
    ],
)
def test_kernels_that_are_wrong_or_missing_are_passed_over_with_one_warning(
    trial: Any, expected: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fused, "trial", trial)
    fused.why_not.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            found = {fused.why_not(torch.device("cuda:0"), torch.bfloat16) for _ in range(3)}
    finally:
        fused.why_not.cache_clear()
    assert found == {expected}
    assert [record.getMessage() for record in caplog.records] == [f"layers do without fused kernels: {expected}"]


def test_a_cpu_asks_for_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "trial", _breaks(AssertionError()))
    assert fused.why_not(torch.device("cpu"), torch.float32) == "they are for CUDA"
    assert not fused.serves(torch.zeros(1))


# --- A layer, and the families -------------------------------------------------------------------------------------


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch, without_cpu_kernels: None) -> None:
    """The kernels serve, whatever the device."""
    monkeypatch.setattr(fused, "serves", lambda _: True)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": lambda path: make_text(path, family="llama"),
    "qwen2": lambda path: make_text(path, family="qwen2", hidden_size=96),
    "qwen3": lambda path: make_text(path, family="qwen3", head_dim=24, hidden_size=72),
    "llava": lambda path: make_llava(path, text="llama"),
    "qwen2_5_vl": lambda path: make_qwen_vl(path, family="qwen2_5_vl"),
    "qwen3_vl": lambda path: make_qwen_vl(path, family="qwen3_vl"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = FAMILIES[request.param](tmp_path_factory.mktemp(request.param))
    return load_text_model(Checkpoint(path), torch.float32, DEVICE)


def logits_of(model: Decoder, attention: AttentionBackend) -> Tensor:
    """Of the mixed rows' last tokens, behind a step that wrote what they see; an image stands in the last row."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    caches = [attention.allocate(6, *shape, torch.float32) for shape in config.kv_shapes]
    embeddings = torch.randn(4, config.hidden_size * len(model.layers), generator=generator).to(DEVICE)
    before = AttentionBatch([17, 16], [17, 16], [[0, 5], [4]])
    wanted = torch.tensor([0, 1, 4, 9], device=DEVICE)
    for batch, images in ((before, ()), (MIXED, ((5, embeddings),))):
        positions = torch.cat(
            [torch.arange(end - n, end) for n, end in zip(batch.query_lens, batch.context_lens, strict=True)]
        ).to(DEVICE)
        if config.position_axes is not None:
            positions = torch.stack((positions, positions % 5, positions % 7), 1)
        hidden = model.embed(torch.arange(1, len(positions) + 1, device=DEVICE))
        hidden = model(hidden, positions, caches, attention, attention.metadata(batch), images, wanted)
    return model.logits(hidden)


@torch.inference_mode()
def test_every_family_has_the_logits_of_torch_s_operators(
    model: Decoder, without_cpu_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "serves", lambda _: False)
    expected = logits_of(model, SdpaAttention(DEVICE, torch.float32))
    monkeypatch.setattr(fused, "serves", lambda _: True)
    torch.testing.assert_close(logits_of(model, TritonAttention(DEVICE)), expected, rtol=1e-4, atol=1e-4)


class CountedKernel:
    """A Triton kernel whose launches are counted; what the interpreter does for them is not."""

    def __init__(self, kernel: Any, name: str, counts: Counter[str]) -> None:
        self._kernel, self._name, self._counts = kernel, name, counts

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self._counts[self._name] += 1

        def launch(*args: Any, **options: Any) -> None:
            with _disable_current_modes():
                self._kernel[grid](*args, **options)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of our Triton kernels is launched."""
    counts: Counter[str] = Counter()
    for module in (norm_triton, paged_triton, rotary_triton, silu_triton):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, CountedKernel(getattr(module, name), name, counts))
    return counts


def operators_of_a_layer(model: Decoder, attention: AttentionBackend, batch: AttentionBatch) -> Counter[str]:
    """Operators of torch in one of the middle layers that launch something; none makes the host wait."""
    config, tokens = model.config, sum(batch.query_lens)
    cache = attention.allocate(6, config.num_key_value_heads, config.head_dim, torch.float32)
    residual, update = (torch.ones(tokens, config.hidden_size, device=DEVICE) for _ in range(2))
    cos, sin = torch.ones(tokens, 2, 1, config.head_dim, device=DEVICE).unbind(1)
    metadata = attention.metadata(batch)
    with torch.inference_mode(), tape.Tape() as recorded:
        model.layers[0](residual, update, (cos, sin), cache, attention, metadata)
    names = [func._schema.name.removeprefix("aten::") for func, *_ in recorded.calls]
    return Counter(name for name in names if "empty" not in name)


PRODUCTS = {"linear": 4}
FUSED = {"_norm_kernel": 2, "_rotate_kernel": 1, "_silu_kernel": 1}


@pytest.mark.parametrize("batch", [MIXED, DECODE], ids=["mixed", "decode"])
def test_a_layer_is_nine_launches(model: Decoder, batch: AttentionBatch, serving: None, launches: Counter[str]) -> None:
    """The number that docs/engine.md names; a context that is cut into shares adds one."""
    assert operators_of_a_layer(model, TritonAttention(DEVICE), batch) == PRODUCTS
    assert launches == {**FUSED, "_attention_kernel": 1}


def test_others_attention_has_the_fused_write_too(model: Decoder, serving: None, launches: Counter[str]) -> None:
    assert operators_of_a_layer(model, OTHERS, DECODE) == PRODUCTS
    assert launches == FUSED


def test_by_torch_s_operators_a_layer_is_twice_as_many(
    model: Decoder, without_cpu_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "serves", lambda _: False)
    with_attention = 1 + operators_of_a_layer(model, OTHERS, DECODE).total()
    assert with_attention == (18 if model.config.qk_norm else 16)
