"""Sampling parameters of requests: those of each prompt of a call, and the defaults of the checkpoint."""

from __future__ import annotations

import logging
from collections import abc
from typing import Any

from pydantic import ValidationError

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.engine.config import EngineConfig
from nanovllm.errors import ConfigurationError, InvalidInput, counted
from nanovllm.sampling_params import SamplingParams
from nanovllm.vision.processor import shape_of

logger = logging.getLogger(__name__)


def default_sampling(generation_defaults: abc.Mapping[str, Any]) -> SamplingParams:
    """The parameters that generation_config.json asks for, over vLLM's defaults; ConfigurationError for wrong ones."""
    try:
        return SamplingParams(**generation_defaults)
    except ValidationError as error:
        name, reason = error.errors()[0]["loc"][0], error.errors()[0]["msg"]
        raise ConfigurationError(
            f"generation_config.json asks for {name} {generation_defaults[str(name)]!r}: {reason}; "
            "generation_config='vllm' leaves the file out"
        ) from None


def ignored_names(config: EngineConfig, checkpoint: Checkpoint) -> list[str]:
    """The names in generation_config.json, where it is read, that have an effect in transformers and none here."""
    return checkpoint.generation_ignored if config.generation_config == "auto" else []


def warn_ignored(config: EngineConfig, checkpoint: Checkpoint) -> None:
    """Log these names, and what a request may have in their place."""
    if names := ignored_names(config, checkpoint):
        logger.warning(
            "generation_config.json asks for what this engine does not do by itself: %s. SamplingParams has bad_words, "
            "logit_bias, min_tokens, max_tokens, stop and n for requests",
            ", ".join(names),
        )


def params_of_prompts(params: Any, num_prompts: int, default: SamplingParams) -> abc.Sequence[SamplingParams]:
    """The sampling parameters of each prompt; InvalidInput for another type or number."""
    if params is None or isinstance(params, SamplingParams):
        return [params or default] * num_prompts
    if not isinstance(params, abc.Sequence) or not all(isinstance(one, SamplingParams) for one in params):
        raise InvalidInput(f"sampling_params is a SamplingParams, or a list with one a prompt, not {shape_of(params)}")
    if len(params) != num_prompts:
        raise InvalidInput(f"{len(params)} sampling_params for {counted(num_prompts, 'prompt')}")
    return params
