"""Options of the backend, as arguments of vLLM's engine. Imports no vLLM."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nanovllm.errors import ConfigurationError

ExecutorBackend = Literal["mp", "ray", "uni"]

_NEVER = frozenset(
    {
        # What runs or opens more than safetensors and vLLM's own code.
        *("trust_remote_code", "code_revision", "load_format", "model_loader_extra_config", "logits_processors"),
        *("worker_cls", "worker_extension_cls", "scheduler_cls", "io_processor_plugin", "model_class_overrides"),
        *("allowed_local_media_path", "allowed_media_domains", "enable_prompt_embeds", "enable_mm_embeds", "hf_token"),
        # What would make it another kind of engine.
        *("runner", "convert", "skip_tokenizer_init", "tokenizer", "tokenizer_mode", "revision", "tokenizer_revision"),
    }
)


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """Everything that the backend can be told; ``extra_args`` are further arguments of vLLM's engine by name.

    ``model`` is what results name, ``directory`` where the checkpoint is. ``step_timeout_s``: longest time without an
    output while requests are at work; None: no bound. ``max_images`` 0 serves text alone.
    """

    model: str
    directory: Path
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    dtype: str = "auto"
    max_images: int = 16
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    distributed_executor_backend: ExecutorBackend | None = None
    generation_config: Literal["auto", "vllm"] = "vllm"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    step_timeout_s: float | None = 300.0
    extra_args: Mapping[str, Any] = field(default_factory=dict)


def engine_arguments(options: VllmOptions, known: Collection[str] | None = None) -> dict[str, Any]:
    """The arguments of vLLM's ``AsyncEngineArgs``; ``known`` are their names, None where they are not at hand.

    Raises:
        ConfigurationError: ``extra_args`` has a name that is not known, never taken, or a setting of its own.
    """
    arguments: dict[str, Any] = {
        "model": str(options.directory),
        "trust_remote_code": False,
        "load_format": "safetensors",
        "dtype": options.dtype,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "max_model_len": options.max_model_len,
        "kv_cache_memory_bytes": options.kv_cache_bytes,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "enable_prefix_caching": options.enable_prefix_caching,
        "enforce_eager": options.enforce_eager,
        "limit_mm_per_prompt": {"image": options.max_images, "video": 0, "audio": 0},
        "tensor_parallel_size": options.tensor_parallel_size,
        "pipeline_parallel_size": options.pipeline_parallel_size,
        "distributed_executor_backend": options.distributed_executor_backend,
        # The library, and the language of grammars, of the native engine.
        "structured_outputs_config": {"backend": "guidance"},
        "scheduling_policy": "priority",
        "disable_log_stats": True,
        "enable_log_requests": False,
    }
    for name in options.extra_args:
        if name in _NEVER:
            raise ConfigurationError(f"vllm.extra_args: {name} is never taken: leave it out")
        if name in arguments:
            raise ConfigurationError(f"vllm.extra_args: {name} is the worker's to set: see `engine` and `vllm`")
        if known is not None and (name not in known or name.startswith("_")):
            raise ConfigurationError(f"vllm.extra_args: vLLM's engine has no argument {name}")
    given = {name: value for name, value in arguments.items() if value is not None}
    return {**given, **options.extra_args}
