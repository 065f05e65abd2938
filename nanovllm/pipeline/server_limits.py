"""Limits of servers for routes: what their dialect has, and tokens by estimate, since they alone can count them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from nanovllm.engine.backends.capabilities import Capabilities
from nanovllm.engine.backends.openai.dialects import Dialect
from nanovllm.engine.backends.openai.estimates import TEMPLATE_TOKENS, image_tokens, text_tokens
from nanovllm.errors import UnsupportedConstraint
from nanovllm.pipeline.build_remote import check_remote, remote_options
from nanovllm.pipeline.documents.page_sizes import Points, rendered_size
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings.worker import Settings


@dataclass(frozen=True)
class ServerLimits:
    """What servers take of a prompt with a page; ``max_model_len`` None where they do not tell it."""

    capabilities: Capabilities
    dialect: Dialect
    max_model_len: int | None
    max_images: int
    generation_defaults: ClassVar[dict[str, Any]] = {}
    is_estimate: ClassVar[bool] = True

    @property
    def takes_images(self) -> bool:
        """Whether a prompt may have an image."""
        return self.capabilities.images and self.max_images > 0

    @property
    def heeded(self) -> frozenset[str]:
        """The sampling parameters that the servers heed."""
        return self.capabilities.sampling

    def text_tokens(self, prompt: str, template_kwargs: Mapping[str, Any]) -> int:
        """About how many tokens the text of ``prompt`` has, with what a chat template puts around it."""
        texts = (value for value in template_kwargs.values() if isinstance(value, str))
        return TEMPLATE_TOKENS + text_tokens("\n".join((prompt, *texts)))

    def page_tokens(self, width: int, height: int) -> int:
        """About how many tokens an image of so many pixels has."""
        return image_tokens(width, height)

    def most_tokens(self, dpi: float, max_pixels: int, points: Points) -> int:
        """About how many tokens a page of ``points`` has at this resolution; servers scale larger ones down."""
        return image_tokens(*rendered_size(points, dpi, max_pixels))

    def lacking(self, sampling: SamplingParams) -> Iterator[tuple[str, str]]:
        """What of ``sampling`` is refused: the parameter, and why."""
        yield from without(self.capabilities, sampling, self.dialect.title)
        if sampling.json_schema is not None:
            try:
                self.dialect.check_schema(sampling.json_schema)
            except UnsupportedConstraint as error:
                yield "json_schema", f"is refused: {error}"


def without(capabilities: Capabilities, sampling: SamplingParams, who: str) -> Iterator[tuple[str, str]]:
    """What of ``sampling`` goes beyond ``capabilities``: the parameter, and why; ``who`` names the backend."""
    for what in capabilities.lacking(sampling):
        parameter = next(word for word in what.split() if word in SamplingParams.model_fields)
        yield parameter, f"is set, and {who} has no {what}"


def server_limits(settings: Settings, context: int | None) -> ServerLimits:
    """The limits of the servers that ``settings`` name, which have ``context`` tokens. Nothing is asked of them.

    Raises:
        ConfigurationError: as `check_remote`.
    """
    check_remote(settings)
    options = remote_options(settings)
    return ServerLimits(
        capabilities=options.capabilities,
        dialect=options.dialect,
        max_model_len=context,
        max_images=settings.engine.max_images_per_request,
    )
