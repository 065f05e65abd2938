"""The options of an engine, under the names that nano-vllm and vLLM users know. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from nanovllm.errors import ConfigurationError

LEAST_KV_BYTES = 1 << 30
"""What the KV cache has on a CPU however little memory there is, unless it is configured."""

Backend = Literal["auto", "native", "generic"]

IMAGE_BOUNDS = ("min_pixels", "max_pixels", "max_image_tokens")
"""Options of towers that take images at their own size."""

HAND_WRITTEN_ALONE = ("deterministic", "quantization", *IMAGE_BOUNDS)
"""Options that transformers' own layers and processors do not have."""

WITHOUT_STATES_ALONE = ("enable_prefix_caching", "num_speculative_tokens")
"""Options that have no effect where layers carry a state of each sequence."""


@dataclass(frozen=True)
class EngineConfig:
    """What a user may decide about an engine; ``None`` leaves the decision to the checkpoint or the machine.

    Raises ConfigurationError for a value that is out of range or not supported yet.
    """

    model: str
    backend: Backend = (
        "auto"  # which code computes the model: this engine's families, transformers' layers, or by model
    )
    max_num_batched_tokens: int | None = None  # the token budget of one step; None: by step_limits.py
    max_num_seqs: int | None = None  # sequences that run at once; None: by step_limits.py
    max_model_len: int | None = None  # prompt and output; None: the checkpoint's, as far as the KV cache holds it
    block_size: int | None = None  # None: the attention backend's
    kv_cache_bytes: int | None = None  # None: what cpu_memory_utilization, or gpu_memory_utilization, leaves
    kv_cache_dtype: Literal["auto", "bfloat16"] = "auto"  # the model's own; "bfloat16" halves a float32 one, on a CPU
    gpu_memory_utilization: float = 0.9
    cpu_memory_utilization: float = 0.4  # of the machine's memory or the control group's limit; 1 GiB of cache at least
    cpu_memory_shares: int = 1  # processes that divide it: what is mapped from files is there once for all of them
    packed_weights_bytes: int = 32 << 30  # of files with packed weights in the user's cache, on a CPU; 0: none
    enable_prefix_caching: bool = True
    embedding_cache_bytes: int = 256 << 20  # beside the encoder
    embedding_cache_host_bytes: int = 0  # in the host's memory, for what leaves a GPU's
    encoder_batch_pixels: int = 2 << 20  # images of waiting requests are encoded with needed ones, up to this area
    encoder_linger_s: float = 0.002  # an idle engine waits so long for more images before it encodes the first
    dtype: str | None = None  # None or "auto": float32 on the CPU, the checkpoint's on a GPU
    device: str | None = None
    seed: int | None = None  # of the requests that bring none; None: drawn from the system
    enforce_eager: bool = False  # without CUDA graphs, which small steps on a GPU run as
    tensor_parallel_size: int = 1
    quantization: Literal["int8"] | None = None  # weights and products of the text model's linear layers, on a CPU
    deterministic: bool = False  # the same bits alone, in any batch, chunked, cached or preempted; on a CPU
    forced_tokens: bool = True  # append what a constraint leaves no choice about without a decode step each
    num_speculative_tokens: int = 8  # most tokens that a row guesses ahead in a step; 0: none
    max_images_per_request: int = 16
    enable_multimodal: bool | None = None  # None: on for a vision-language checkpoint, or when a vision_model is named
    vision_model: str | None = None
    max_image_size: int | None = None
    num_vision_tokens: int | None = None
    min_pixels: int | None = None  # least area of an image, where the model takes images at their own size
    max_pixels: int | None = None  # and the largest; None: the checkpoint's
    max_image_tokens: int | None = None  # and the most tokens of one, which lowers max_pixels
    projector: str | Path | None = None
    generation_config: Literal["auto", "vllm"] = "auto"  # "vllm": the checkpoint's sampling defaults are not read
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # variables of every request's chat template
    freeze_vision_weights: bool = True

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "cpu_memory_shares", "max_images_per_request", "max_num_batched_tokens",
                     "max_model_len", "block_size", "kv_cache_bytes", "max_image_size", "num_vision_tokens",
                     "min_pixels", "max_pixels", "max_image_tokens"):  # fmt: skip
            value = getattr(self, name)
            if value is None and getattr(EngineConfig, name) is None:  # the default
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError(f"{name} must be a positive integer, got {value!r}")
        for name in ("embedding_cache_bytes", "embedding_cache_host_bytes", "encoder_batch_pixels", "encoder_linger_s",
                     "packed_weights_bytes", "num_speculative_tokens"):  # fmt: skip
            value = getattr(self, name)
            if not (_is_number(value) and value >= 0):
                raise ConfigurationError(f"{name} must be a number, and not negative, got {value!r}")
        for name in ("gpu_memory_utilization", "cpu_memory_utilization"):
            value = getattr(self, name)
            if not (_is_number(value) and 0.0 < value <= 1.0):
                raise ConfigurationError(f"{name} must be a number in (0, 1], got {value!r}")
        if self.tensor_parallel_size != 1:
            raise ConfigurationError(
                f"tensor_parallel_size={self.tensor_parallel_size}: the native engine runs on one GPU; "
                "a model that needs several is for another engine, such as vLLM"
            )
        if self.quantization not in (None, "int8"):
            raise ConfigurationError(f"quantization={self.quantization!r} is not supported, only None and 'int8' are")
        if self.kv_cache_dtype not in ("auto", "bfloat16"):
            raise ConfigurationError(f"kv_cache_dtype={self.kv_cache_dtype!r} is neither 'auto' nor 'bfloat16'")
        if self.backend not in ("auto", "native", "generic"):
            raise ConfigurationError(f"backend={self.backend!r} is none of auto, native, generic")
        if self.generation_config not in ("auto", "vllm"):
            raise ConfigurationError(f"generation_config={self.generation_config!r} is neither 'auto' nor 'vllm'")
        if self.dtype not in (None, "auto", "float32", "bfloat16", "float16"):
            raise ConfigurationError(f"dtype={self.dtype!r} is none of auto, float32, bfloat16, float16")

    @classmethod
    def from_options(cls, model: str | Path, options: Mapping[str, Any]) -> EngineConfig:
        """The configuration for ``model`` with ``options`` by name; an unknown name is a ConfigurationError."""
        if unknown := sorted(set(options) - {field.name for field in fields(cls)}):
            raise ConfigurationError(f"unknown engine option: {', '.join(unknown)}")
        return cls(model=str(model), **options)

    def refuse(self, names: Iterable[str], why: str) -> None:
        """Raise ConfigurationError, with the reason ``why``, for the first of ``names`` that is not at its default."""
        for name in names:
            if (value := getattr(self, name)) != getattr(EngineConfig, name):
                raise ConfigurationError(f"{name}={str(value) if isinstance(value, Path) else value!r}, but {why}")

    @property
    def wants_vision(self) -> bool | None:
        """Whether images are asked for; None when the checkpoint decides."""
        if self.enable_multimodal is not None:
            return self.enable_multimodal
        return True if self.vision_model is not None else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
