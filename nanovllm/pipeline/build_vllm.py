"""vLLM's engine in this process, from the settings, which are checked before it is loaded."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.engine.backends.capabilities import GUIDED_KINDS, SAMPLING_NAMES
from nanovllm.engine.backends.vllm.options import VllmOptions
from nanovllm.engine.backends.vllm.sampling import CAPABILITIES
from nanovllm.errors import ConfigurationError, InvalidInput
from nanovllm.pipeline.documents.model_profile import model_profile
from nanovllm.settings.worker import Settings

if TYPE_CHECKING:
    from nanovllm.engine.backends.vllm.backend import VllmEngine

ENGINE_SETTINGS = frozenset(
    {
        *("backend", "model", "model_aliases", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "dtype"),
        *("kv_cache_bytes", "gpu_memory_utilization", "enforce_eager", "enable_prefix_caching", "generation_config"),
        *("max_images_per_request", "chat_template_kwargs", "job_chat_template_kwargs", "profile", "step_timeout_s"),
    }
)
"""Settings of ``engine`` that have a meaning for vLLM."""


def check_vllm(settings: Settings, directory: Path) -> None:
    """Refuse what the settings ask for and vLLM cannot do; imports vLLM, for seconds, for ``vllm.extra_args`` alone.

    Raises:
        ConfigurationError: a setting of another engine, a sampling default, an argument, or vLLM is not installed.
    """
    from nanovllm.engine.backends.vllm.loading import check_arguments

    for name in settings.engine.set_beside(ENGINE_SETTINGS):
        raise ConfigurationError(
            f"engine.{name} is set, which the backend vllm has not: unset it, or see vllm.extra_args"
        )
    try:
        CAPABILITIES.check(settings.sampling, "the backend vllm")
    except InvalidInput as error:
        raise ConfigurationError(f"sampling: {error}") from None
    check_arguments(vllm_options(settings, directory))


def vllm_options(settings: Settings, directory: Path) -> VllmOptions:
    """The options of the backend, for the checkpoint in ``directory``."""
    engine, vllm = settings.engine, settings.vllm
    # A directory is named by its last part: the name is part of results, which must not contain a worker's paths.
    name = engine.model if engine.model and not Path(engine.model).is_dir() else directory.resolve().name
    profile = model_profile(engine, directory)
    return VllmOptions(
        model=name,
        directory=directory,
        max_num_seqs=engine.seats_elsewhere,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_model_len=engine.max_model_len,
        kv_cache_bytes=engine.kv_cache_bytes,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        enable_prefix_caching=engine.enable_prefix_caching,
        enforce_eager=engine.enforce_eager,
        dtype=engine.dtype,
        max_images=engine.max_images_per_request,
        tensor_parallel_size=vllm.tensor_parallel_size,
        pipeline_parallel_size=vllm.pipeline_parallel_size,
        distributed_executor_backend=vllm.distributed_executor_backend,
        generation_config=engine.generation_config,
        chat_template_kwargs=profile.template_kwargs(profile.profile),
        step_timeout_s=engine.step_timeout_s,
        extra_args=vllm.extra_args,
    )


def build_vllm_engine(settings: Settings, directory: Path) -> VllmEngine:
    """The backend over vLLM's engine, which runs; takes minutes. Raises as `check_vllm` and `load_vllm`."""
    check_vllm(settings, directory)
    from nanovllm.engine.backends.vllm.loading import load_vllm

    options = vllm_options(settings, directory)
    loaded = load_vllm(options)
    from nanovllm.engine.backends.vllm.backend import VllmEngine  # behind the variables that loading sets

    return VllmEngine(loaded, options)


def vllm_findings(settings: Settings, directory: Path) -> list[tuple[str, str, str]]:
    """What vLLM would be given, and what it can do: subject, value, note. Loads no model. Raises as `check_vllm`."""
    check_vllm(settings, directory)
    options = vllm_options(settings, directory)
    installed = importlib.metadata.packages_distributions().get("vllm", ["vllm"])[0]
    parallel = f"tensors by {options.tensor_parallel_size}, layers by {options.pipeline_parallel_size}"
    lacks = ", ".join(sorted(SAMPLING_NAMES - CAPABILITIES.sampling))
    return [
        ("backend", "vllm (engine.backend vllm)", f"{installed} {importlib.metadata.version(installed)}"),
        ("model", options.model, "vLLM decides at start whether it knows it"),
        ("parallel", parallel, f"run by {options.distributed_executor_backend or 'what vLLM chooses'}"),
        ("guided output", ", ".join(kind for kind in GUIDED_KINDS if kind in CAPABILITIES.guided), "by guidance"),
        ("sampling", "as vLLM samples", f"refused by name: {lacks}"),
    ]
