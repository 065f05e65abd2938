"""Settings of vLLM's engine in the worker's process: ``engine.backend: vllm``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from nanovllm.settings.base import SettingsModel


class VllmSettings(SettingsModel):
    """vLLM's engine in the worker's process, beside what `engine` says; with `engine.backend: vllm`."""

    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that each layer is divided among.")
    pipeline_parallel_size: int = Field(1, ge=1, description="Groups of such GPUs that the layers are divided among.")
    distributed_executor_backend: Literal["mp", "ray", "uni"] | None = Field(
        None,
        description="What runs vLLM's workers: `mp` processes of this machine, `ray` a Ray cluster of several, `uni` "
        "the engine's own process; unset: as vLLM chooses.",
    )
    extra_args: dict[str, Any] = Field(
        default_factory=dict,
        description='Further arguments of vLLM\'s engine by name (JSON object), such as `{"quantization": "fp8"}`. '
        "Unknown names are refused, and what would run code of a checkpoint: `trust_remote_code` is always false.",
    )
