"""Loading of a model of transformers with its towers: the plain model computes what the trial compares with."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import transformers

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.checkpoints.resolve import checkpoint_name
from nanovllm.engine.config import EngineConfig
from nanovllm.engine.layers.linear import choose_torch_layouts
from nanovllm.engine.models.generic import GenericDecoder
from nanovllm.engine.models.generic_loading import check_config, check_release, has_images, load_transformers_model
from nanovllm.engine.models.generic_trial import Reference, compute_reference
from nanovllm.engine.models.llava import composed_encoder
from nanovllm.errors import ConfigurationError, UnsupportedModel
from nanovllm.vision.encoders.base import ImageEncoder
from nanovllm.vision.encoders.generic import AS_DECODED, GenericEncoder
from nanovllm.vision.encoders.generic_processor import OneImageProcessor, image_token_of
from nanovllm.vision.images.preprocess import ImageTransform

_VISION_OPTIONS = (
    "vision_model", "projector", "min_pixels", "max_pixels", "max_image_size", "max_image_tokens", "num_vision_tokens",
)  # fmt: skip


def one_image_processor(config: EngineConfig, checkpoint: Checkpoint) -> OneImageProcessor | None:
    """The processor of a checkpoint whose configuration may run; None where it takes no images, or is to take none.

    Reads no weights. Raises as `load_generic_models`.
    """
    check_release(transformers.__version__)
    check_config(checkpoint)
    if not has_images(checkpoint.config) or config.wants_vision is False:
        return None
    name = checkpoint_name(checkpoint.directory)
    for option in _VISION_OPTIONS:
        if (value := getattr(config, option)) is not None:
            raise ConfigurationError(
                f"{option}={str(value)!r}, but {name!r} brings towers of its own, and its images are as its "
                "processor_config.json says"
            )
    token = image_token_of(checkpoint.config)
    if token is None:
        raise UnsupportedModel(f"the configuration of {name!r} names no token for images")
    return OneImageProcessor(checkpoint, token, max_images=config.max_images_per_request)


def generic_image_tokens(
    config: EngineConfig, checkpoint: Checkpoint
) -> tuple[ImageTransform, Callable[[tuple[int, int]], int]] | None:
    """What is done to images as they are decoded, and the tokens of one of a (height, width); None without images."""
    processor = one_image_processor(config, checkpoint)
    if processor is None:
        return None
    return AS_DECODED, lru_cache(lambda size: len(processor(np.zeros((*size, 3), np.uint8))[0]))


def load_generic_models(
    config: EngineConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> tuple[GenericDecoder, ImageEncoder | None, Reference]:
    """The decoder, the towers or a separate vision model, and what transformers computes with the same weights.

    Raises:
        UnsupportedModel: a model, a processor or a layer that cannot run over this engine's attention.
        ConfigurationError: options that such a model does not have.
    """
    processor = one_image_processor(config, checkpoint)
    plain = load_transformers_model(checkpoint, dtype, device)
    reference = compute_reference(plain, config.max_model_len, processor, config.max_images_per_request)
    model = GenericDecoder(plain)
    model.config.context_limit(config.max_model_len)  # before the trial: it names the layer
    model.choose_layouts(config.quantization, tile=1 if config.deterministic else None)
    encoder: ImageEncoder | None = None
    if processor is not None:
        encoder = GenericEncoder(
            plain, processor, name=checkpoint_name(checkpoint.directory), dtype=dtype, device=device
        )
    elif config.wants_vision and not has_images(checkpoint.config):
        encoder = composed_encoder(config, model, dtype, device)
    if encoder is not None:
        _ = encoder.revision  # computed now: it needs the plain weights
        choose_torch_layouts(encoder)
    return model, encoder, reference
