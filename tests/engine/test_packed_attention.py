"""Our Triton kernel over packed sequences, alone and in the towers of transformers: interpreted, or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from checkpoints import QwenVL, make_llava, make_qwen_vl
from generic_checkpoints import make_generic_images
from generic_parts import needs_release
from PIL import Image
from torch import Tensor
from triton_interpreter import DEVICE

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.engine.attention.selection import TOLERANCES
from nanovllm.engine.config import EngineConfig
from nanovllm.engine.execution.generic_models import load_generic_models
from nanovllm.vision.encoders.clip import VisionEncoder
from nanovllm.vision.encoders.packed_attention import attend_packed, is_packed, packed_heads
from nanovllm.vision.encoders.qwen import NativeEncoder
from nanovllm.vision.images.preprocess import AS_DECODED, prepare_image, prepare_rgb

if (reason := triton_interpreter.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from nanovllm.engine.attention.packed import TritonPackedAttention, choose_packed_attention, packed_trial
from nanovllm.engine.kernels import packed_triton
from nanovllm.engine.kernels.paged_triton import Tile

# Of one patch square, of windows that an edge cuts, of one window, of several.
SIZES = ((1, 1), (64, 64), (200, 90), (57, 113))
FAMILIES: tuple[QwenVL, ...] = ("qwen2_5_vl", "qwen3_vl")


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(1000 * width + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen_vl(tmp_path_factory.mktemp(request.param), family=request.param, smallest=784)


def error_of(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a part of its image's largest value."""
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("dtype", "heads", "dim"),
    [
        (torch.float32, 2, 24),
        (torch.float32, 1, 80),
        (torch.float32, 1, 256),
        (torch.bfloat16, 2, 72),
        (torch.bfloat16, 1, 80),
        (torch.float16, 3, 64),
        (torch.float16, 1, 128),
    ],
    ids=str,
)
def test_sequences_of_any_lengths_equal_plain_attention(dtype: torch.dtype, heads: int, dim: int) -> None:
    assert packed_trial(TritonPackedAttention(DEVICE), heads, dim, DEVICE, dtype) <= TOLERANCES[dtype]


def test_grouped_heads_and_another_scale_equal_torch_and_nothing_beside_a_sequence_is_read() -> None:
    starts = list(accumulate((5, 1, 40), initial=0))
    query, key, value = (torch.randn(46, heads, 20, device=DEVICE) for heads in (6, 2, 2))
    wide = torch.full((60, 2, 40), float("nan"), device=DEVICE)
    wide[:46, :, :20] = key
    found = packed_triton.packed_attention(
        query, wide[:46, :, :20], value, torch.tensor(starts, dtype=torch.int32, device=DEVICE), 0.3, Tile(16, 16, 4, 2)
    )
    for first, end in pairwise(starts):
        one, *others = (part[first:end].transpose(0, 1) for part in (query, key, value))
        expected = F.scaled_dot_product_attention(
            one[None], *(part[None] for part in others), scale=0.3, enable_gqa=True
        )
        assert torch.allclose(found[first:end].transpose(0, 1), expected[0], atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_towers_embed_images_of_different_sizes_as_through_transformers_attention(
    checkpoint: Path, dtype: torch.dtype, tolerance: float
) -> None:
    encoder = NativeEncoder(checkpoint, dtype=dtype, device=DEVICE)
    images = [prepare_image(picture(*size), encoder.transform) for size in SIZES]
    expected, revision = encoder.embed(images), encoder.revision
    calls = []
    attention = TritonPackedAttention(DEVICE)
    attend_packed(encoder.tower, lambda *args, **options: calls.append(1) or attention(*args, **options))
    assert error_of(encoder.embed(images), expected) <= tolerance
    assert len(calls) == len(encoder.tower.blocks)
    del encoder.revision
    assert encoder.revision == revision


def test_layers_of_a_tower_look_at_no_values(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each look would wait for it."""
    encoder = NativeEncoder(checkpoint)
    images = [prepare_image(picture(*size), encoder.transform) for size in SIZES]
    forward = encoder.tower.forward

    def refuse(name: str) -> Callable[..., Any]:
        def look(*_: Any) -> Any:
            raise AssertionError(f"the tower looks: {name}")

        return look

    def guarded(*args: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "cpu", "numpy"):
                patch.setattr(torch.Tensor, name, refuse(name))
            return forward(*args, **options)

    monkeypatch.setattr(encoder.tower, "forward", guarded)
    with pytest.raises(AssertionError, match="the tower looks: tolist"):
        encoder.embed(images)
    attend_packed(encoder.tower, lambda query, key, value, starts, scale: value)
    encoder.embed(images)


@needs_release
def test_towers_of_models_of_transformers_that_keep_an_images_size_are_served_too(tmp_path: Path) -> None:
    make_generic_images(tmp_path, "qwen2_vl")
    config = EngineConfig(str(tmp_path), backend="generic", max_model_len=320)
    _, encoder, _ = load_generic_models(config, Checkpoint(tmp_path), torch.float32, DEVICE)
    assert encoder is not None
    images = [prepare_rgb(picture(*size), AS_DECODED) for size in ((64, 40), (30, 90))]
    expected = encoder.embed(images)
    heads = packed_heads(encoder.tower)
    assert heads
    attention = choose_packed_attention(heads, DEVICE, torch.float32)
    assert attention is not None
    attend_packed(encoder.tower, attention)
    assert error_of(encoder.embed(images), expected) <= 1e-5


def test_towers_of_one_size_keep_their_attention(tmp_path: Path) -> None:
    encoder = VisionEncoder.from_llava(make_llava(tmp_path, tower="clip", patch=16, size=64))
    assert packed_heads(encoder.tower) == set()
    assert choose_packed_attention(set(), DEVICE, torch.float32) is None
    assert not is_packed(encoder.tower)


def test_a_kernel_that_is_wrong_or_raises_serves_no_tower(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = packed_triton.packed_attention

    def off(*args: Any) -> Tensor:
        found = right(*args)
        found[-1] = float("nan")
        return found

    def raising(*_: Any) -> Tensor:
        raise RuntimeError("no image for this device")

    for wrong, words in ((off, "off by nan"), (raising, "RuntimeError: no image for this device")):
        monkeypatch.setattr(packed_triton, "packed_attention", wrong)
        assert choose_packed_attention({(1, 16)}, DEVICE, torch.float32) is None
        assert words in caplog.text
