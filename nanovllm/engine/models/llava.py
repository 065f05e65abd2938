"""LLaVA: image embeddings stand among the token embeddings of a text model, and attention does the rest.

The text half may be of any family; the tower and projector are :class:`nanovllm.vision.encoders.clip.VisionEncoder`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.checkpoints.resolve import checkpoint_name, resolve_checkpoint
from nanovllm.engine.config import IMAGE_BOUNDS, EngineConfig
from nanovllm.engine.models.text_model import TextModel
from nanovllm.errors import ConfigurationError
from nanovllm.vision.encoders.clip import PROJECTOR_PREFIXES, TOWER_PREFIXES, VisionEncoder
from nanovllm.vision.images.preprocess import ImageTransform

TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    *((prefix, None) for prefix in (*TOWER_PREFIXES, *PROJECTOR_PREFIXES)),
    ("", ""),
)
"""For ``weight_map.UnfilledDecoder``: tensors' names of transformers before 4.52, and after it."""


def own_encoder(
    checkpoint: Checkpoint, config: EngineConfig, dtype: torch.dtype, device: torch.device
) -> VisionEncoder:
    """The encoder that a LLaVA checkpoint was trained with, at the size and tokens asked for.

    Raises ConfigurationError for an option that contradicts the checkpoint or that its tower does not have.
    """
    _refuse_foreign_options(checkpoint, config)
    return VisionEncoder.from_llava(
        checkpoint.directory,
        max_image_size=config.max_image_size,
        num_vision_tokens=config.num_vision_tokens,
        freeze_vision_weights=config.freeze_vision_weights,
        dtype=dtype,
        device=device,
    )


def image_tokens(checkpoint: Checkpoint, config: EngineConfig) -> tuple[ImageTransform, Callable[[Any], int]]:
    """The preprocessing of ``own_encoder``, and the tokens of an image, the same for all; reads no weights."""
    _refuse_foreign_options(checkpoint, config)
    transform, tokens = VisionEncoder.tokens_of_llava(
        checkpoint.directory, max_image_size=config.max_image_size, num_vision_tokens=config.num_vision_tokens
    )
    return transform, lambda size: tokens


def composed_encoder(config: EngineConfig, text: TextModel, dtype: torch.dtype, device: torch.device) -> VisionEncoder:
    """A separate vision model in front of a text model; ConfigurationError for an option that its tower lacks."""
    _refuse_pixel_bounds(config)
    return VisionEncoder(
        text.config.hidden_size,
        config.vision_model or "openai/clip-vit-base-patch32",
        projector=config.projector,
        max_image_size=config.max_image_size,
        num_vision_tokens=config.num_vision_tokens,
        freeze_vision_weights=config.freeze_vision_weights,
        dtype=dtype,
        device=device,
    )


def _refuse_foreign_options(checkpoint: Checkpoint, config: EngineConfig) -> None:
    name = checkpoint_name(checkpoint.directory)
    _refuse_pixel_bounds(config)
    if config.vision_model is not None and resolve_checkpoint(config.vision_model) != checkpoint.directory:
        raise ConfigurationError(f"vision_model={config.vision_model!r}, but {name!r} brings a tower of its own")
    config.refuse(["projector"], f"{name!r} brings a projector of its own")


def _refuse_pixel_bounds(config: EngineConfig) -> None:
    why = "a CLIP or SigLIP tower takes all images at one size: see max_image_size and num_vision_tokens"
    config.refuse(IMAGE_BOUNDS, why)
