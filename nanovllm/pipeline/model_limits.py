"""Limits of a model for routes, by its checkpoint's files: exact tokens, constraints that compile. Reads no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from nanovllm.engine.backends.capabilities import Capabilities
from nanovllm.errors import ConfigurationError, UnsupportedConstraint
from nanovllm.pipeline import build
from nanovllm.pipeline.documents.page_sizes import Points
from nanovllm.pipeline.server_limits import without
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings.engine import DEFAULT_MODEL
from nanovllm.settings.worker import Settings

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.engine.models.text_model import TextConfig
    from nanovllm.engine.sampling.grammar_compiler import GrammarCompiler
    from nanovllm.engine.text.prompt_encoder import PromptEncoder
    from nanovllm.vision.images.preprocess import ImageTransform

MOST_MEASURED_PIXELS = 1 << 24
"""Of an image whose tokens are measured; every processor of transformers shrinks larger ones."""


@dataclass(frozen=True)
class ModelLimits:
    """What a model makes of a prompt and of a page, and how much it takes."""

    prompts: PromptEncoder
    grammars: GrammarCompiler
    max_model_len: int
    max_images: int
    generation_defaults: Mapping[str, Any]
    transform: ImageTransform | None
    tokens_of: Callable[[tuple[int, int]], int]
    capabilities: Capabilities = field(default_factory=Capabilities)
    is_estimate: ClassVar[bool] = False

    @property
    def heeded(self) -> frozenset[str]:
        """The sampling parameters that the engine heeds."""
        return self.capabilities.sampling

    @property
    def image_token_id(self) -> int | None:
        """The token that stands once for each image; None for a model without images."""
        return self.prompts.image_token_id

    @property
    def takes_images(self) -> bool:
        """Whether a prompt may have an image."""
        return self.transform is not None and self.max_images > 0

    def text_tokens(self, prompt: str, template_kwargs: Mapping[str, Any]) -> int:
        """Tokens of the text of ``prompt``. Raises InvalidInput: the model cannot take it at all."""
        tokens = self.prompts.untrusted(prompt, chat_template_kwargs=template_kwargs)
        return sum(token != self.image_token_id for token in tokens)

    def page_tokens(self, width: int, height: int) -> int:
        """Tokens of an image of so many pixels. Raises InvalidInput: preprocessing refuses it."""
        assert self.transform is not None
        return self.tokens_of(self.transform.check(width, height))

    def most_tokens(self, dpi: float, max_pixels: int, points: Points) -> int:
        """The most tokens of a page of up to ``max_pixels``, whatever its proportions."""
        return most_tokens(self, max_pixels)

    def lacking(self, sampling: SamplingParams) -> Iterator[tuple[str, str]]:
        """What of ``sampling`` is refused: the parameter, and why."""
        yield from without(self.capabilities, sampling, "the backend vllm")  # native engines lack none
        if (constraint := sampling.constraint) is not None:
            try:
                self.grammars.matcher(constraint)
            except (UnsupportedConstraint, ConfigurationError) as error:
                yield constraint.kind, f"does not compile: {error}"


@contextmanager
def model_limits(settings: Settings) -> Iterator[ModelLimits]:
    """The limits of the model that ``settings`` name, from its files; it imports torch, for seconds.

    On a GPU without ``engine.kv_cache_bytes`` the KV cache may hold less than the context: an engine knows. On a CPU
    the least cache counts, so that the answer is the same on every machine.

    Raises:
        ConfigurationError, UnsupportedModel, ModelNotFound: it would not be served either.
    """
    from nanovllm.checkpoints.checkpoint import Checkpoint
    from nanovllm.checkpoints.resolve import resolve_checkpoint
    from nanovllm.engine.config import LEAST_KV_BYTES, EngineConfig
    from nanovllm.engine.execution.generic_models import generic_image_tokens
    from nanovllm.engine.execution.loading import choose_device, choose_dtype, choose_image_token_id
    from nanovllm.engine.models.generic import stated_config
    from nanovllm.engine.models.registry import around_image, decoder_config, image_tokens, is_generic
    from nanovllm.engine.sampling.grammar_compiler import GrammarCompiler
    from nanovllm.engine.text.prompt_encoder import PromptEncoder

    build.check_parts(settings)
    model = settings.engine.model or DEFAULT_MODEL
    config = EngineConfig.from_options(model, build.engine_options(settings.engine))
    checkpoint = Checkpoint(resolve_checkpoint(model))
    tokenizer = checkpoint.tokenizer()
    text: TextConfig
    if is_generic(checkpoint, config.backend):
        text, images = stated_config(checkpoint.config), generic_image_tokens(config, checkpoint)
    else:
        text, images = decoder_config(checkpoint)[0], image_tokens(checkpoint, config)
    max_model_len = text.context_limit(config.max_model_len)
    device = choose_device(config.device)
    kv_bytes = config.kv_cache_bytes or (LEAST_KV_BYTES if device.type == "cpu" else None)
    if kv_bytes is not None:
        item_bytes = 2 if config.kv_cache_dtype == "bfloat16" else choose_dtype(config, checkpoint, device).itemsize
        token_bytes = 2 * item_bytes * sum(heads * width for heads, width in text.kv_shapes)
        max_model_len = min(max_model_len, kv_bytes // token_bytes)
    grammars = GrammarCompiler(tokenizer, text.vocab_size, sorted(checkpoint.eos_token_ids(text.vocab_size, tokenizer)))
    try:
        yield ModelLimits(
            prompts=PromptEncoder(
                tokenizer,
                max_model_len=max_model_len,
                image_token_id=choose_image_token_id(checkpoint, tokenizer, text.vocab_size) if images else None,
                around_image=around_image(checkpoint),
                is_processor_template=checkpoint.processor_template is not None,
                chat_template_kwargs=config.chat_template_kwargs,
            ),
            grammars=grammars,
            max_model_len=max_model_len,
            max_images=config.max_images_per_request,
            generation_defaults=checkpoint.generation_defaults if config.generation_config == "auto" else {},
            transform=images[0] if images else None,
            tokens_of=images[1] if images else lambda size: 0,
        )
    finally:
        grammars.close()


@contextmanager
def vllm_limits(settings: Settings, context: int | None = None) -> Iterator[ModelLimits]:
    """The limits of the model that vLLM runs for ``settings``, from its files; it imports torch, for seconds, no vLLM.

    An image has the tokens that transformers' processor of the checkpoint gives it. ``context`` is what vLLM has of
    tokens, once it is loaded; None: what the settings or the checkpoint say.

    Raises:
        ConfigurationError: template variables, or a profile, that there are not.
        UnsupportedModel, ModelNotFound: no tokenizer, or no processor of transformers for its images.
    """
    from nanovllm.checkpoints.checkpoint import Checkpoint
    from nanovllm.engine.backends.vllm.loading import grammar_compiler, prompt_encoder
    from nanovllm.engine.backends.vllm.sampling import CAPABILITIES
    from nanovllm.engine.execution.generic_models import checkpoint_processor, image_tokens_of
    from nanovllm.engine.models.generic_loading import max_positions
    from nanovllm.pipeline.build_vllm import vllm_options

    options = vllm_options(settings, build.checkpoint_directory(settings.engine))
    checkpoint = Checkpoint(options.directory)
    max_model_len = context or options.max_model_len or max_positions(checkpoint.config)
    vocab_size = int(checkpoint.config.get_text_config().vocab_size)
    processor_options = options.extra_args.get("mm_processor_kwargs") or {}
    images = None
    if options.max_images:
        # What becomes of several images together vLLM decides, which refuses what it cannot do at its start.
        processor = checkpoint_processor(checkpoint, max_images=1, options=processor_options)
        images = None if processor is None else image_tokens_of(processor)
    grammars = grammar_compiler(checkpoint, vocab_size)
    try:
        yield ModelLimits(
            prompts=prompt_encoder(
                checkpoint, options, vocab_size=vocab_size, max_model_len=max_model_len, has_images=images is not None
            ),
            grammars=grammars,
            max_model_len=max_model_len,
            max_images=options.max_images,
            generation_defaults=checkpoint.generation_defaults if options.generation_config == "auto" else {},
            transform=images[0] if images else None,
            tokens_of=images[1] if images else lambda size: 0,
            capabilities=CAPABILITIES,
        )
    finally:
        grammars.close()


def limits_of(engine: LLMEngine) -> ModelLimits:
    """The limits of an engine that is loaded."""
    processor = engine.input_processor
    encoder = engine.processor.encoder if engine.processor is not None else None
    return ModelLimits(
        prompts=processor.prompts,
        grammars=processor.grammars,
        max_model_len=engine.max_model_len,
        max_images=engine.config.max_images_per_request,
        generation_defaults=engine.generation_defaults,
        transform=None if encoder is None else encoder.transform,
        tokens_of=(lambda size: 0) if encoder is None else encoder.num_tokens,
    )


def most_tokens(limits: ModelLimits, max_pixels: int) -> int:
    """The most tokens of an image of up to ``max_pixels``, whatever its proportions.

    Under a pixel budget sides are rounded to multiples, up by half of one at most (by one where an image is enlarged),
    and two sides with one area are together at their longest where the image is as narrow as is allowed. What a
    processor of transformers makes of an image is measured, at the proportions of pages.
    """
    from nanovllm.vision.images.preprocess import MOST_ELONGATED

    transform = limits.transform
    assert transform is not None
    if transform.resize is None:
        return max(limits.tokens_of(size) for size in _measured_sizes(max_pixels))
    if transform.resize != "pixel_budget":
        return limits.tokens_of(transform.output_size or (0, 0))
    smallest, largest, multiple = transform.size

    def bound(area: int, slack: float) -> int:
        sides = sqrt(area) * (sqrt(MOST_ELONGATED) + 1 / sqrt(MOST_ELONGATED)) / multiple
        return int(area / multiple**2 + slack * sides + slack**2)

    return min(largest // multiple**2, max(bound(max_pixels, 0.5), bound(smallest, 1.0)))


def _measured_sizes(max_pixels: int) -> Iterator[tuple[int, int]]:
    """Heights and widths of images of an area: from three times as wide as high to three times as high as wide."""
    area = min(max_pixels, MOST_MEASURED_PIXELS)
    for proportion in (1 / 3, 1 / sqrt(2), 1.0, sqrt(2), 3.0):
        yield max(1, int(sqrt(area * proportion))), max(1, int(sqrt(area / proportion)))
