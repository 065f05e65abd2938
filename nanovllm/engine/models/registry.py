"""Model families, one file each, found by the ``architectures`` entry of a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.checkpoints.resolve import checkpoint_name
from nanovllm.checkpoints.transformers_imports import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from nanovllm.engine.config import IMAGE_BOUNDS, Backend, EngineConfig
from nanovllm.engine.models.decoder import Decoder, DecoderConfig
from nanovllm.engine.models.llama import llama
from nanovllm.engine.models.qwen2 import qwen2
from nanovllm.engine.models.qwen3 import qwen3
from nanovllm.engine.models.text_model import TextConfig, TextModel
from nanovllm.engine.models.weight_map import UnfilledDecoder
from nanovllm.engine.scheduling.sequence import ImageSpan
from nanovllm.errors import UnsupportedModel
from nanovllm.vision.encoders.base import ImageEncoder
from nanovllm.vision.images.preprocess import ImageTransform

LLAVA = "LlavaForConditionalGeneration"
QWEN_VL = ("Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration")

_AROUND_IMAGE = (("vision_start_token_id", "vision_end_token_id"), ("image_start_token_id", "image_end_token_id"))

TEXT_FAMILIES: dict[str, Callable[[Any], DecoderConfig]] = {
    "LlamaForCausalLM": llama,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
}


def _with_tower(architecture: str) -> ModuleType | None:
    """The module of a family with a tower of its own, None for others.

    Imported when such a checkpoint comes: it imports the towers of transformers, for more than a second.
    """
    if architecture == LLAVA:
        return import_module("nanovllm.engine.models.llava")
    if architecture in QWEN_VL:
        return import_module("nanovllm.engine.models.qwen_vl")
    return None


def text_architecture(config: Any) -> str:
    """The ``…ForCausalLM`` that transformers has for a text configuration; its ``model_type`` where it has none."""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type))


def is_generic(checkpoint: Checkpoint, backend: Backend) -> bool:
    """Whether transformers' layers compute the model: where that is asked for, or no family is written for it."""
    is_written = checkpoint.architecture in (*TEXT_FAMILIES, LLAVA, *QWEN_VL)
    if checkpoint.architecture == LLAVA:
        is_written = text_architecture(checkpoint.config.get_text_config()) in TEXT_FAMILIES
    return not is_written if backend == "auto" else backend == "generic"


def load_text_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The text model of any supported checkpoint, its weights as they are stored; raises as `unfilled_text_model`."""
    unfilled = unfilled_text_model(checkpoint, dtype)
    for _ in unfilled.fill(device):
        pass
    return unfilled.model


def unfilled_text_model(checkpoint: Checkpoint, dtype: torch.dtype) -> UnfilledDecoder:
    """The text model of any supported checkpoint, alone or behind a tower, before its weights are read.

    Raises UnsupportedModel for others.
    """
    config, prefixes = decoder_config(checkpoint)
    return UnfilledDecoder(
        checkpoint,
        config,
        # transformers reads it at the outermost level, to which some families' configurations lift it from the text's.
        tied=bool(getattr(checkpoint.config, "tie_word_embeddings", False)),
        prefixes=prefixes,
        dtype=dtype,
    )


def decoder_config(checkpoint: Checkpoint) -> tuple[DecoderConfig, Sequence[tuple[str, str | None]]]:
    """The text model's configuration, and the prefixes of its tensors' names; raises as `unfilled_text_model`."""
    text: Any = checkpoint.config.get_text_config()
    architecture = checkpoint.architecture
    if quantization := checkpoint.fields.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModel(
            f"the checkpoint's weights are quantised ({method!r}), which is not supported: take the unquantised "
            "checkpoint; quantization='int8' quantises it at start"
        )
    family = _with_tower(architecture)
    prefixes: Sequence[tuple[str, str | None]] = (("", ""),) if family is None else family.TEXT_PREFIXES
    if family is not None and architecture != LLAVA:
        return family.DECODERS[architecture](text), prefixes
    if architecture == LLAVA:
        architecture = text_architecture(text)
        if architecture not in TEXT_FAMILIES:
            raise UnsupportedModel(
                f"a LLaVA checkpoint over {text.model_type!r} text is not supported; "
                f"its text may be {', '.join(TEXT_FAMILIES)}"
            )
    elif architecture not in TEXT_FAMILIES:
        raise UnsupportedModel(
            f"architecture {architecture!r} is not supported; supported are "
            f"{', '.join((*TEXT_FAMILIES, LLAVA, *QWEN_VL))}"
        )
    return TEXT_FAMILIES[architecture](text), prefixes


def image_tokens(
    checkpoint: Checkpoint, config: EngineConfig
) -> tuple[ImageTransform, Callable[[tuple[int, int]], int]] | None:
    """The preprocessing of a checkpoint's own encoder, and the tokens of an image of a (height, width) after it.

    Reads no weights. None where the checkpoint has no tower of its own. Raises ConfigurationError as `load_encoder`.
    """
    family = _with_tower(checkpoint.architecture)
    if family is not None:
        found: tuple[ImageTransform, Callable[[tuple[int, int]], int]] = family.image_tokens(checkpoint, config)
        return found
    _refuse_image_bounds(checkpoint, config)
    return None


def load_encoder(
    checkpoint: Checkpoint, config: EngineConfig, text: TextModel, dtype: torch.dtype, device: torch.device
) -> ImageEncoder | None:
    """The vision encoder: a vision-language checkpoint's own, the separate one that was asked for, or None.

    Raises ConfigurationError for options that contradict the checkpoint.
    """
    if config.wants_vision is False:
        return None
    family = _with_tower(checkpoint.architecture)
    if family is not None:
        own: ImageEncoder = family.own_encoder(checkpoint, config, dtype, device)
        return own
    if config.wants_vision:
        from nanovllm.engine.models.llava import composed_encoder

        return composed_encoder(config, text, dtype, device)
    _refuse_image_bounds(checkpoint, config)
    return None


def _refuse_image_bounds(checkpoint: Checkpoint, config: EngineConfig) -> None:
    config.refuse(IMAGE_BOUNDS, f"{checkpoint_name(checkpoint.directory)!r} takes no images: unset it")


def around_image(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """The tokens before and behind an image, where the family has them."""
    for names in _AROUND_IMAGE:
        before, behind = (getattr(checkpoint.config, name, None) for name in names)
        if isinstance(before, int) and isinstance(behind, int):
            return before, behind
    return None


def positions_of(config: TextConfig, images: Sequence[ImageSpan], start: int, end: int) -> Sequence[Any]:
    """The positions of a sequence's tokens [start, end): plain numbers, or triples where the family has axes."""
    if config.position_axes is None:
        return range(start, end)
    if isinstance(config, DecoderConfig):
        from nanovllm.engine.models.qwen_vl import positions as qwen_positions

        return qwen_positions(images, start, end)
    from nanovllm.engine.models.generic import positions as generic_positions

    return generic_positions(images, start, end, config.num_axes)
