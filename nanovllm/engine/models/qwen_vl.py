"""Qwen2.5-VL (arXiv 2409.12191) and Qwen3-VL (arXiv 2511.21631): tokens at three positions, time, height and width.

The positions turn each its own frequencies of a head (M-RoPE): in Qwen2.5-VL these are three runs, in Qwen3-VL they are
interleaved. The towers are :class:`nanovllm.vision.encoders.qwen.NativeEncoder`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.checkpoints.resolve import checkpoint_name
from nanovllm.engine.config import EngineConfig
from nanovllm.engine.models.decoder import DecoderConfig
from nanovllm.engine.scheduling.sequence import ImageSpan
from nanovllm.errors import UnsupportedModel
from nanovllm.vision.encoders.qwen import NativeEncoder, native_tokens, native_transform, vision_config
from nanovllm.vision.images.preprocess import ImageTransform

TEXT_PREFIXES = (("model.language_model.", "model."), ("model.visual.", None), ("visual.", None), ("", ""))
"""For ``weight_map.UnfilledDecoder``: tensors' names as the hub has them, and as transformers 5 saves them."""


def qwen2_5_vl(config: Any) -> DecoderConfig:
    """The decoder of a ``Qwen2_5_VLForConditionalGeneration``: Qwen2 text."""
    axes = tuple(axis for axis, length in enumerate(_sections(config)) for _ in range(length))
    return DecoderConfig.of(config, qkv_bias=True, position_axes=axes)


def qwen3_vl(config: Any) -> DecoderConfig:
    """The decoder of a ``Qwen3VLForConditionalGeneration``: Qwen3 text."""
    shares = _sections(config)
    axes = tuple(
        pair % 3 if pair % 3 and pair < 3 * shares[pair % 3] else 0  # what is left over turns with time
        for pair in range(sum(shares))
    )
    bias = config.attention_bias
    return DecoderConfig.of(config, qk_norm=True, qkv_bias=bias, output_bias=bias, position_axes=axes)


DECODERS = {
    "Qwen2_5_VLForConditionalGeneration": qwen2_5_vl,
    "Qwen3VLForConditionalGeneration": qwen3_vl,
}
"""The decoder of each architecture, of its text's configuration."""


def _sections(config: Any) -> tuple[int, int, int]:
    """How many of a head's frequencies rotate with time, height and width; UnsupportedModel where some remain."""
    found = (config.rope_parameters or {}).get("mrope_section")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not found or len(found) != 3 or 2 * sum(found) != head_dim:
        raise UnsupportedModel(f"mrope_section {found} does not share out the {head_dim // 2} frequencies of a head")
    time, height, width = found
    return int(time), int(height), int(width)


def own_encoder(
    checkpoint: Checkpoint, config: EngineConfig, dtype: torch.dtype, device: torch.device
) -> NativeEncoder:
    """The encoder that the checkpoint was trained with.

    Images keep their own proportions: ``max_image_size`` and ``num_vision_tokens`` bound their area and their tokens.
    Raises ConfigurationError for an option that contradicts the checkpoint, and bounds between which no image fits.
    """
    return NativeEncoder(
        checkpoint.directory,
        **_pixel_bounds(checkpoint, config),
        freeze_vision_weights=config.freeze_vision_weights,
        dtype=dtype,
        device=device,
    )


def positions(images: Sequence[ImageSpan], start: int, end: int) -> list[tuple[int, int, int]]:
    """Time, height and width of a sequence's tokens [start, end).

    Text counts on, the same in all three. An image's tokens share the time at which it begins, and lie below and beside
    one another from there; the text behind goes on after the longer of its sides.
    """
    found: list[tuple[int, int, int]] = []
    saved = 0  # token index minus position
    for span in images:
        assert span.grid is not None  # the encoder of this family gives one
        rows, columns = span.grid
        if span.end <= start:
            saved += span.length - max(rows, columns)
            continue
        found += [(index - saved,) * 3 for index in range(start + len(found), min(end, span.start))]
        begin = span.start - saved
        for index in range(max(start, span.start), min(end, span.end)):
            row, column = divmod(index - span.start, columns)
            found.append((begin, begin + row, begin + column))
        saved += span.length - max(rows, columns)
    return found + [(index - saved,) * 3 for index in range(start + len(found), end)]


def image_tokens(
    checkpoint: Checkpoint, config: EngineConfig
) -> tuple[ImageTransform, Callable[[tuple[int, int]], int]]:
    """The preprocessing of ``own_encoder``, and the tokens of an image of a (height, width); reads no weights."""
    transform = native_transform(
        checkpoint.directory, vision_config(checkpoint.fields), **_pixel_bounds(checkpoint, config)
    )
    return transform, partial(native_tokens, transform)


def _pixel_bounds(checkpoint: Checkpoint, config: EngineConfig) -> dict[str, int | None]:
    name = checkpoint_name(checkpoint.directory)
    config.refuse(("vision_model", "projector"), f"{name!r} brings a tower and a projector of its own")
    tokens = [bound for bound in (config.max_image_tokens, config.num_vision_tokens) if bound is not None]
    return {
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
        "max_image_size": config.max_image_size,
        "max_image_tokens": min(tokens, default=None),
    }
