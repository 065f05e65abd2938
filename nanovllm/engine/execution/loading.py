"""Loading: the models, dtypes and image token of a checkpoint, for a configuration and a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.engine import kernels
from nanovllm.engine.attention.base import AttentionBackend
from nanovllm.engine.attention.cpu_paged import PagedCpuAttention
from nanovllm.engine.attention.packed import choose_packed_attention
from nanovllm.engine.config import EngineConfig
from nanovllm.engine.execution.packed_weights import load_packed_encoder, load_packed_text
from nanovllm.engine.layers import fused
from nanovllm.engine.layers.linear import why_no_int8
from nanovllm.engine.layers.panel_forms import is_emulated
from nanovllm.engine.models.registry import is_generic
from nanovllm.engine.models.text_model import TextModel
from nanovllm.errors import ConfigurationError, counted
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER
from nanovllm.start_phases import START, Phase
from nanovllm.vision.embedding_cache import EmbeddingCache, MemoryTier
from nanovllm.vision.encoders.base import ImageEncoder
from nanovllm.vision.processor import VisionProcessor

if TYPE_CHECKING:
    from nanovllm.engine.models.generic_trial import Reference


def choose_device(name: str | None) -> torch.device:
    """The named device; without a name a GPU if torch sees one, else the CPU. Raises ConfigurationError."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ConfigurationError(f"device={name!r} is no device such as 'cpu', 'cuda' or 'cuda:1'") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device={name!r}: this engine computes on 'cpu' and 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"device={name!r}: torch sees no GPU here; 'cpu' computes without")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigurationError(f"device={name!r}: torch sees {counted(count, 'GPU')}, numbered from 0")
    return device


def numbered(device: torch.device) -> torch.device:
    """``device`` with the number of the calling thread's current GPU where it has none: other threads have another."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def choose_dtype(config: EngineConfig, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The configured dtype; else float32 on a CPU, and the checkpoint's on a GPU.

    Raises ConfigurationError for one that this CPU would emulate, where our kernels, which widen it, are missing.
    """
    if config.dtype not in (None, "auto"):
        dtype: torch.dtype = getattr(torch, str(config.dtype))
        if device.type == "cpu" and is_emulated(dtype) and (reason := kernels.missing()) is not None:
            raise ConfigurationError(
                f"dtype={config.dtype!r}: this CPU has no instructions for it, and our kernels, which multiply by such "
                f"weights in float32, cannot be used: {reason}. Set dtype='float32'"
            )
        return dtype
    if device.type == "cpu":
        return torch.float32
    stored = checkpoint.config.get_text_config().dtype or checkpoint.config.dtype
    return stored if isinstance(stored, torch.dtype) else torch.bfloat16


def choose_kv_dtype(
    config: EngineConfig, dtype: torch.dtype, device: torch.device, attention: AttentionBackend
) -> torch.dtype:
    """The model's dtype, or bfloat16 where that is configured and our kernel reads it. Raises ConfigurationError."""
    if config.kv_cache_dtype == "auto" or dtype == torch.bfloat16:
        return dtype
    if dtype != torch.float32 or not isinstance(attention, PagedCpuAttention):
        raise ConfigurationError(
            f"kv_cache_dtype='bfloat16' needs a float32 model on a CPU and our kernels; this is {dtype} on "
            f"{device}, kernels: {kernels.missing() or 'there'}"
        )
    return torch.bfloat16


def choose_image_token_id(checkpoint: Checkpoint, tokenizer: Any, vocab_size: int) -> int:
    """The token that marks an image: the checkpoint's, the tokenizer's, or one that no text can contain."""
    for name in ("image_token_index", "image_token_id"):
        if (own := getattr(checkpoint.config, name, None)) is not None:
            return int(own)
    return int(tokenizer.get_vocab().get(IMAGE_PLACEHOLDER, max(vocab_size, len(tokenizer))))


def load_models(
    config: EngineConfig, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> tuple[TextModel, ImageEncoder | None, Reference | None]:
    """The text model and the image encoder, their weights in the layouts of this machine.

    A model of transformers comes with what transformers itself computes with it.
    """
    reason = why_no_int8(device) if config.quantization == "int8" else None
    if reason is not None:
        raise ConfigurationError(f"quantization='int8' is not possible on {device}: {reason}. Leave quantization out")
    if is_generic(checkpoint, config.backend):
        from nanovllm.engine.execution.generic_models import load_generic_models  # transformers' layers: seconds

        with START.timed(Phase.WEIGHTS):
            generic, encoder, reference = load_generic_models(config, checkpoint, dtype, device)
        _choose_tower_attention(encoder, dtype, device)
        return generic, encoder, reference
    with START.timed(Phase.WEIGHTS):
        model = load_packed_text(config, checkpoint, dtype, device)
    fused.serves(model.embed_tokens)  # tried and told now: nothing can be tried while a graph is captured
    with START.timed(Phase.WEIGHTS):
        encoder = load_packed_encoder(config, checkpoint, model, dtype, device)
    if encoder is not None:
        _choose_tower_attention(encoder, dtype, device)
        if config.deterministic:
            encoder.batch_size = 1
    return model, encoder, None


def _choose_tower_attention(encoder: ImageEncoder | None, dtype: torch.dtype, device: torch.device) -> None:
    """On CUDA, attend to all images and windows of a batch in one call, in towers that can."""
    if encoder is None or device.type != "cuda":
        return
    from nanovllm.vision.encoders.packed_attention import attend_packed, packed_heads

    attention = choose_packed_attention(packed_heads(encoder.tower), device, dtype)
    if attention is not None:
        attend_packed(encoder.tower, attention)


def make_processor(
    config: EngineConfig, encoder: ImageEncoder, image_token_id: int, device: torch.device
) -> VisionProcessor:
    """The encoder with its embedding cache: on the device, and in host memory if that is configured."""
    num_bytes = config.embedding_cache_host_bytes
    host = [MemoryTier("host", num_bytes, "cpu")] if num_bytes else []
    return VisionProcessor(
        encoder,
        image_token_id=image_token_id,
        cache=EmbeddingCache(config.embedding_cache_bytes, *host, device=device),
    )
