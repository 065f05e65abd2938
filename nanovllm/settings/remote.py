"""Settings of the servers that ``engine.backend: openai`` asks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode

from nanovllm.settings.base import Seconds, SettingsModel, StrList, split_list

SecretList = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(split_list)]


def _is_bare_url(text: str) -> bool:
    """Whether it is a URL over HTTP that holds no password and no token."""
    try:
        url = urlsplit(text)
        is_good = url.scheme in ("http", "https") and bool(url.hostname) and (url.port or 1) > 0
    except ValueError:
        return False
    return is_good and "@" not in url.netloc and not url.query and not url.fragment


class RemoteSettings(SettingsModel):
    """Servers of OpenAI's protocol: vLLM, SGLang, llama.cpp's, hosted ones; with `engine.backend: openai`."""

    endpoints: StrList = Field(
        (),
        description="Base URLs of servers that serve one model, such as `http://vllm-0:8000/v1,http://vllm-1:8000/v1`.",
    )
    dialect: Literal["openai", "vllm", "sglang", "llamacpp"] = Field(
        "openai",
        description="What the servers know beyond OpenAI's own parameters: constraints, `top_k`, `min_p` and others. "
        "What they lack is refused by name.",
    )
    api_keys: SecretList = Field(
        (), description="API keys, sent as bearer tokens: one for all endpoints, or one for each in their order."
    )
    ca_file: Path | None = Field(None, description="PEM file of the servers' CA; unset: the system's CAs.")
    proxy: str | None = Field(
        None,
        description="URL (http:// or https://) of the HTTP proxy to all endpoints but those at a loopback address; "
        "unset: none. `HTTP_PROXY` and the like of the environment are not heeded.",
    )
    images: bool = Field(True, description="Whether the model takes images.")
    logprobs: bool = Field(
        True,
        description="Whether the servers give log probabilities; if not, fields of documents have none, and jobs that "
        "ask for them are refused.",
    )
    revision: str = Field(
        "unknown", min_length=1, description="Revision of the model that results name: the protocol tells none."
    )
    max_concurrency: int = Field(
        64, ge=1, description="Most requests at one endpoint at a time; all together `engine.max_num_seqs`."
    )
    affinity_slack: int = Field(
        4,
        ge=0,
        description="So many more requests than the idlest endpoint has may be at the one that equal images, or an "
        "equal beginning of the text, went to before; 0: the idlest takes each.",
    )
    connect_timeout_s: Seconds = Field(5.0, description="Longest wait for a connection.")
    read_timeout_s: Seconds = Field(120.0, description="Longest silence of a server that answers a request.")
    request_timeout_s: Seconds = Field(600.0, description="Longest time of one request at one endpoint.")
    max_attempts: int | None = Field(
        None,
        ge=1,
        description="So many failures of servers with one job make it a delayed retry or a dead letter "
        "(`answer_failed`); unset: a failure of a server is never the job's.",
    )
    breaker_requests: int = Field(
        3,
        ge=1,
        description="After so many different requests that failed at an endpoint, and none that was answered, a short "
        "request of the worker's own decides: where it fails too, the endpoint is left out until one is answered.",
    )
    breaker_wait_s: Seconds = Field(1.0, description="First wait before a stopped endpoint is tried; it doubles.")
    breaker_max_wait_s: Seconds = Field(
        30.0,
        description="Longest wait before a stopped endpoint is tried. One that has answered nothing for so long, and "
        "has no request, is asked for its models.",
    )
    image_transport: Literal["data", "presigned"] = Field(
        "data",
        description="`presigned`: images that are objects with a version in S3 are sent as presigned URLs, which the "
        "servers must reach, where the file needs no conversion; all others, and with `data` all, inside the request.",
    )
    presigned_s: int = Field(900, ge=1, le=604_800, description="Seconds for which such a URL is valid.")
    image_format: Literal["png", "jpeg"] = Field(
        "png", description="Format of images whose own file servers read differently; `jpeg` is smaller, and lossy."
    )
    raw_prompts: bool = Field(
        False, description="Take prompts without a chat template, which no job has (`/completions`)."
    )

    @field_validator("proxy")
    @classmethod
    def _check_proxy(cls, proxy: str | None) -> str | None:
        if proxy is not None and not _is_bare_url(proxy):
            raise ValueError("is no http:// or https:// URL without user, query and fragment")  # not shown, as below
        return proxy

    @field_validator("endpoints")
    @classmethod
    def _check_endpoints(cls, endpoints: tuple[str, ...]) -> tuple[str, ...]:
        for number, endpoint in enumerate(endpoints, 1):
            # Not shown: it may hold a password or a token.
            if not _is_bare_url(endpoint):
                raise ValueError(f"number {number} is no http:// or https:// URL without user, query and fragment")
        stripped = tuple(endpoint.rstrip("/") for endpoint in endpoints)
        if len(set(stripped)) < len(stripped):
            raise ValueError("an endpoint is listed twice")
        return stripped

    @model_validator(mode="after")
    def _check_together(self) -> RemoteSettings:
        if len(self.api_keys) not in (0, 1, len(self.endpoints)):
            raise ValueError(
                f"{len(self.api_keys)} api_keys for {len(self.endpoints)} endpoints: give one, or one for each"
            )
        if any(
            not key.get_secret_value().isascii() or not key.get_secret_value().isprintable() for key in self.api_keys
        ):
            raise ValueError("an API key has characters that no header takes")
        return self
