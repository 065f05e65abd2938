"""Model families, one file each, found by the ``architectures`` entry of a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nanovllm.engine.config import EngineConfig
from nanovllm.engine.loader import Checkpoint
from nanovllm.engine.models.llava import composed_encoder, from_llava_checkpoint, own_encoder
from nanovllm.engine.models.qwen3 import Qwen3, from_qwen3_checkpoint
from nanovllm.errors import UnsupportedModel
from nanovllm.vision.encoder import VisionEncoder

LLAVA = "LlavaForConditionalGeneration"

FAMILIES: dict[str, Callable[[Checkpoint, torch.dtype, torch.device], Qwen3]] = {
    "Qwen3ForCausalLM": from_qwen3_checkpoint,
    LLAVA: from_llava_checkpoint,
}


def load_text_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Qwen3:
    """The text model of any supported checkpoint; raises UnsupportedModel for others."""
    family = FAMILIES.get(checkpoint.architecture)
    if family is None:
        raise UnsupportedModel(
            f"architecture {checkpoint.architecture!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return family(checkpoint, dtype, device)


def load_encoder(
    checkpoint: Checkpoint, config: EngineConfig, text: Qwen3, dtype: torch.dtype, device: torch.device
) -> VisionEncoder | None:
    """The vision encoder: a LLaVA checkpoint's own, the separate one that was asked for, or None."""
    is_llava = checkpoint.architecture == LLAVA
    if config.wants_vision is False or (config.wants_vision is None and not is_llava):
        return None
    if is_llava:
        return own_encoder(checkpoint, config, dtype, device)
    return composed_encoder(config, text, dtype, device)
