"""Loading of a model of transformers with its towers: the plain model computes what the trial compares with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import transformers

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.checkpoints.resolve import checkpoint_name
from nanovllm.engine.config import HAND_WRITTEN_ALONE, IMAGE_BOUNDS, EngineConfig
from nanovllm.engine.layers.linear import choose_torch_layouts
from nanovllm.engine.models.generic import GenericDecoder
from nanovllm.engine.models.generic_loading import check_config, check_release, has_images, load_transformers_model
from nanovllm.engine.models.generic_states import STATEFUL_LAYERS
from nanovllm.engine.models.generic_trial import Reference, compute_reference
from nanovllm.engine.models.llava import composed_encoder
from nanovllm.errors import UnsupportedModel
from nanovllm.vision.encoders.base import ImageEncoder
from nanovllm.vision.encoders.generic import GenericEncoder
from nanovllm.vision.encoders.generic_processor import OneImageProcessor, image_token_of
from nanovllm.vision.images.preprocess import AS_DECODED, ImageTransform

_VISION_OPTIONS = ("vision_model", "projector", *IMAGE_BOUNDS, "max_image_size", "num_vision_tokens")


def check_options(config: EngineConfig, checkpoint: Checkpoint) -> None:
    """Raise ConfigurationError for options that transformers' own layers and processors do not have."""
    name, text = checkpoint_name(checkpoint.directory), checkpoint.config.get_text_config()
    takes_images = has_images(checkpoint.config) and config.wants_vision is not False
    if takes_images:
        config.refuse(
            _VISION_OPTIONS,
            f"{name!r} brings towers of its own, and its own processor bounds images: unset it",
        )
    config.refuse(
        HAND_WRITTEN_ALONE,
        f"{name!r} runs through transformers' own layers, which have no such option: unset it, or take a checkpoint "
        "of a family that this engine has code for",
    )
    is_default_or_off = config.num_speculative_tokens in (0, EngineConfig.num_speculative_tokens)
    if not is_default_or_off and any(kind in STATEFUL_LAYERS for kind in getattr(text, "layer_types", None) or ()):
        config.refuse(
            ["num_speculative_tokens"],
            f"layers of {name!r} carry states, which no rejected draft gives back: unset it, or set it to 0",
        )


def one_image_processor(config: EngineConfig, checkpoint: Checkpoint) -> OneImageProcessor | None:
    """The processor of a checkpoint whose configuration may run; None where it takes no images, or is to take none.

    Reads no weights. Raises as `load_generic_models`.
    """
    check_release(transformers.__version__)
    check_config(checkpoint)
    check_options(config, checkpoint)
    if config.wants_vision is False:
        return None
    return checkpoint_processor(checkpoint, max_images=config.max_images_per_request)


def checkpoint_processor(
    checkpoint: Checkpoint, *, max_images: int, options: Mapping[str, Any] | None = None
) -> OneImageProcessor | None:
    """The processor of a checkpoint, whatever computes the model; None where it takes no images.

    ``max_images`` and ``options``: see `OneImageProcessor`. Reads no weights.

    Raises:
        UnsupportedModel: as `OneImageProcessor`; the configuration names no token for images.
    """
    if not has_images(checkpoint.config):
        return None
    token = image_token_of(checkpoint.config)
    if token is None:
        name = checkpoint_name(checkpoint.directory)
        raise UnsupportedModel(f"the configuration of {name!r} names no token for images")
    return OneImageProcessor(checkpoint, token, max_images=max_images, options=options)


def generic_image_tokens(
    config: EngineConfig, checkpoint: Checkpoint
) -> tuple[ImageTransform, Callable[[tuple[int, int]], int]] | None:
    """What is done to images as they are decoded, and the tokens of one of a (height, width); None without images."""
    processor = one_image_processor(config, checkpoint)
    return None if processor is None else image_tokens_of(processor)


def image_tokens_of(processor: OneImageProcessor) -> tuple[ImageTransform, Callable[[tuple[int, int]], int]]:
    """What is done to images as they are decoded, and the tokens of one of a (height, width), by ``processor``."""
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
    model.choose_layouts()
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
