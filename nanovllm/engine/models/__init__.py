"""Model families, one file each, found by the ``architectures`` entry of a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nanovllm.engine.config import EngineConfig
from nanovllm.engine.loader import Checkpoint
from nanovllm.engine.models.decoder import Decoder, DecoderConfig
from nanovllm.engine.models.llama import llama
from nanovllm.engine.models.llava import composed_encoder, own_encoder, text_name
from nanovllm.engine.models.qwen2 import qwen2
from nanovllm.engine.models.qwen3 import qwen3
from nanovllm.engine.models.weights import load_decoder
from nanovllm.errors import UnsupportedModel
from nanovllm.vision.encoder import VisionEncoder

LLAVA = "LlavaForConditionalGeneration"

TEXT_FAMILIES: dict[str, Callable[[Any], DecoderConfig]] = {
    "LlamaForCausalLM": llama,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
}


def text_architecture(config: Any) -> str:
    """The ``…ForCausalLM`` that transformers has for a text configuration; its ``model_type`` where it has none."""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type))


def load_text_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The text model of any supported checkpoint, alone or in a LLaVA; raises UnsupportedModel for others."""
    is_llava = checkpoint.architecture == LLAVA
    if not is_llava and checkpoint.architecture not in TEXT_FAMILIES:
        raise UnsupportedModel(
            f"architecture {checkpoint.architecture!r} is not supported; supported are "
            f"{', '.join((*TEXT_FAMILIES, LLAVA))}"
        )
    text: Any = checkpoint.config.get_text_config()
    architecture = text_architecture(text) if is_llava else checkpoint.architecture
    if architecture not in TEXT_FAMILIES:
        raise UnsupportedModel(
            f"a LLaVA checkpoint over {text.model_type!r} text is not supported; "
            f"its text may be {', '.join(TEXT_FAMILIES)}"
        )
    return load_decoder(
        checkpoint,
        TEXT_FAMILIES[architecture](text),
        tied=bool(checkpoint.config.tie_word_embeddings or text.tie_word_embeddings),
        rename=text_name if is_llava else str,
        dtype=dtype,
        device=device,
    )


def load_encoder(
    checkpoint: Checkpoint, config: EngineConfig, text: Decoder, dtype: torch.dtype, device: torch.device
) -> VisionEncoder | None:
    """The vision encoder: a LLaVA checkpoint's own, the separate one that was asked for, or None."""
    is_llava = checkpoint.architecture == LLAVA
    if config.wants_vision is False or (config.wants_vision is None and not is_llava):
        return None
    if is_llava:
        return own_encoder(checkpoint, config, dtype, device)
    return composed_encoder(config, text, dtype, device)
