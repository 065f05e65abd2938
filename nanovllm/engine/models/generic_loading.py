"""Loading of any model of transformers: local files, safetensors, no code of a checkpoint."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.checkpoints.resolve import checkpoint_name
from nanovllm.engine.layers.rotary import known_positions
from nanovllm.engine.models.generic_states import STATEFUL_LAYERS
from nanovllm.errors import ConfigurationError, UnsupportedModel, counted

OLDEST = (5, 24)
"""The first release of transformers that these modules are tested with: interfaces that they use moved before."""

_LAYER_TYPES = ("full_attention", "sliding_attention", *STATEFUL_LAYERS)
_ROPE_BY_LENGTH = ("dynamic", "longrope")
_MAX_SHOWN_CHARS = 300
_ABOUT_KERNELS = logging.getLogger("transformers.integrations.hub_kernels")


def load_transformers_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Any:
    """The checkpoint's model as transformers has it, with the attention that transformers chooses.

    Raises:
        UnsupportedModel: what transformers cannot load; tensors that are missing, of another shape, or unknown to the
            model and to its family's own list of those that checkpoints have in vain.
    """
    name, config = checkpoint_name(checkpoint.directory), checkpoint.config
    _ = checkpoint.names  # a damaged file is named by the reader of it
    factory: Any = AutoModelForImageTextToText if has_images(config) else AutoModelForCausalLM
    if device.type == "cpu":
        _ABOUT_KERNELS.setLevel(logging.ERROR)  # it recommends kernels that are for GPUs alone
    shows_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, report = factory.from_pretrained(
            checkpoint.directory,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused by name below
        )
        model.to(device).eval().requires_grad_(False)
    except Exception as error:  # a family's constructor raises whatever it likes
        why = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_SHOWN_CHARS]
        raise UnsupportedModel(f"transformers cannot load {name!r} ({config.model_type!r}): {why}") from error
    finally:
        if shows_progress:
            transformers_logging.enable_progress_bar()
    for tensor, found, wanted in sorted(report["mismatched_keys"]):
        raise UnsupportedModel(
            f"{tensor} of checkpoint {name!r} has the shape {list(found)}, where config.json says {list(wanted)}"
        )
    if missing := sorted(map(str, report["missing_keys"])):
        raise UnsupportedModel(f"checkpoint {name!r} lacks {counted(len(missing), 'tensor')}, such as {missing[0]}")
    if unknown := sorted(map(str, report["unexpected_keys"])):
        raise UnsupportedModel(
            f"checkpoint {name!r} has {counted(len(unknown), 'tensor')} that a {type(model).__name__} has no place "
            f"for, such as {unknown[0]}"
        )
    return model


def has_images(config: Any) -> bool:
    """Whether transformers' model for a ``config`` takes images."""
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def check_release(version: str) -> None:
    """Raise ConfigurationError for an installed transformers ``version`` before `OLDEST`."""
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise ConfigurationError(
            f"transformers {version}: models without a family of this engine's own need {wanted} or later; "
            f"pip install 'transformers>={wanted},<6'"
        )


def check_config(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedModel for a configuration whose model no attention over tokens in order can compute."""
    config = checkpoint.config
    text: Any = config.get_text_config()
    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if has_images(config) else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    known = mapping.get(config.model_type)
    if known is None:
        raise UnsupportedModel(
            f"architecture {checkpoint.architecture!r} is not supported: transformers {transformers.__version__} has "
            f"no model of type {config.model_type!r} that answers text or images with text, and code of a checkpoint "
            "is not run"
        )
    classes = (known,) if isinstance(known, str) else tuple(known)
    if checkpoint.architecture not in ("", *classes):
        raise UnsupportedModel(
            f"architecture {checkpoint.architecture!r} is not supported: for models of type {config.model_type!r} "
            f"{' or '.join(classes)} is"
        )
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{checkpoint.architecture!r} is an encoder-decoder, which is not supported")
    if quantization := checkpoint.fields.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedModel(
            f"the checkpoint's weights are quantised ({method!r}), which is not supported: take the unquantised one"
        )
    for index, kind in enumerate(getattr(text, "layer_types", None) or ()):
        if kind not in _LAYER_TYPES:
            raise UnsupportedModel(
                f"layer {index}: layers of type {kind!r} are not supported; {', '.join(_LAYER_TYPES)} are"
            )
    for index in getattr(text, "cross_attention_layers", None) or ():
        raise UnsupportedModel(f"layer {index}: cross-attention is not supported")
    rope = getattr(text, "rope_parameters", None) or {}
    for fields in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if fields.get("rope_type") in _ROPE_BY_LENGTH:
            raise UnsupportedModel(
                f"rope_type {fields['rope_type']!r} is not supported: it turns all tokens of a step by the longest "
                "context among them"
            )


def known_window(config: Any) -> int:
    """The largest window or chunk in tokens that a text model's ``config`` names, whatever uses it; 0: none."""
    sizes = [
        value
        for name, value in config.to_dict().items()
        if any(word in name for word in ("window", "chunk")) and isinstance(value, int) and not isinstance(value, bool)
    ]
    return max(sizes, default=0)


def max_positions(config: Any) -> int:
    """The longest context in tokens that a transformers ``config`` allows; UnsupportedModel where it names none."""
    text = config.get_text_config()
    own = getattr(text, "max_position_embeddings", None)
    if own is None:
        raise UnsupportedModel(f"the configuration of {config.model_type!r} has no max_position_embeddings")
    return known_positions(text) if hasattr(text, "rope_parameters") else int(own)
