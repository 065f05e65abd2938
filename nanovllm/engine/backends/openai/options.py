"""Options of the backend: its servers, their limits, and how images are sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import SecretStr

from nanovllm.engine.backends.capabilities import Capabilities
from nanovllm.engine.backends.openai.dialects import DIALECTS, Dialect
from nanovllm.sampling_params import SamplingParams

SignUrl = Callable[[str, str], str]
"""From the S3 URI and the version of an object to a URL that gives it; may block, and raises SystemicError."""


@dataclass(frozen=True)
class EndpointOptions:
    """One server: its base URL, which ends in ``/v1`` as a rule, and its API key."""

    url: str
    api_key: SecretStr | None = None


@dataclass(frozen=True, kw_only=True)
class OpenAIOptions:
    """Everything that the backend can be told.

    ``model`` None: the only one that the servers list. ``max_num_seqs`` are the requests at work, at most
    ``max_concurrency`` of them at one endpoint. ``max_attempts`` None: a failing server is never the request's fault.
    ``default_max_tokens`` is what requests ask for as a rule: it must leave a prompt room in the servers' context.
    ``proxy``: URL of the HTTP proxy to all endpoints but those of this machine.
    ``sign_url`` None: every image is sent inside its request.
    """

    endpoints: tuple[EndpointOptions, ...]
    model: str | None = None
    revision: str = "unknown"
    dialect: Dialect = field(default=DIALECTS["openai"])
    images: bool = True
    logprobs: bool = True
    max_images_per_request: int = 16
    max_num_seqs: int = 64
    max_concurrency: int = 64
    default_max_tokens: int | None = None
    affinity_slack: int = 4
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 120.0
    request_timeout_s: float = 600.0
    max_attempts: int | None = None
    breaker_requests: int = 3
    breaker_wait_s: float = 1.0
    breaker_max_wait_s: float = 30.0
    ca_file: Path | None = None
    proxy: str | None = None
    raw_prompts: bool = False
    chat_template_kwargs: dict[str, object] = field(default_factory=dict)
    image_format: Literal["png", "jpeg"] = "png"
    sign_url: SignUrl | None = None

    @property
    def capabilities(self) -> Capabilities:
        """What the dialect's servers can do, as far as these options let them."""
        able = self.dialect.capabilities
        return replace(able, images=self.images, logprobs=able.logprobs if self.logprobs else None)

    def check(self, sampling: SamplingParams) -> None:
        """Refuse what ``sampling`` asks for and the servers have not.

        Raises:
            UnsupportedConstraint: a kind of constraint, or a JSON schema that they would not enforce.
            InvalidInput: anything else.
        """
        self.capabilities.check(sampling, self.dialect.title)
        if sampling.json_schema is not None:
            self.dialect.check_schema(sampling.json_schema)
