"""The engine that asks servers of OpenAI's protocol, from the settings, which are checked before anything is sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nanovllm.engine.backends.capabilities import GUIDED_KINDS, SAMPLING_NAMES
from nanovllm.engine.backends.openai.dialects import DIALECTS
from nanovllm.engine.backends.openai.options import EndpointOptions, OpenAIOptions, SignUrl
from nanovllm.errors import ConfigurationError, InvalidInput, counted
from nanovllm.messages.s3_uri import split_object_uri
from nanovllm.objects.s3_client import S3Client, make_client
from nanovllm.pipeline.documents.model_profile import served_profile
from nanovllm.settings.s3 import S3Settings
from nanovllm.settings.worker import Settings
from nanovllm.terminal import Row

if TYPE_CHECKING:
    from nanovllm.engine.backends.openai.backend import OpenAIEngine

ENGINE_SETTINGS = frozenset(
    {
        *("backend", "model", "max_num_seqs", "max_images_per_request"),
        *("chat_template_kwargs", "job_chat_template_kwargs", "profile"),
    }
)
"""Settings of ``engine`` that have a meaning for servers; every other one is theirs to set."""


def check_remote(settings: Settings) -> None:
    """Refuse what the settings ask for and the servers' dialect cannot do.

    Raises:
        ConfigurationError: a setting of the engine in this process, a sampling default, or template variables.
    """
    engine, dialect = settings.engine, DIALECTS[settings.remote.dialect]
    for name in engine.set_beside(ENGINE_SETTINGS):
        raise ConfigurationError(
            f"engine.{name} is set, which the backend openai has not: set it on the servers, and unset it here"
        )
    if not dialect.template_kwargs and (engine.chat_template_kwargs or engine.job_chat_template_kwargs):
        raise ConfigurationError(
            f"engine.chat_template_kwargs or job_chat_template_kwargs is set, which the dialect {dialect.name} of "
            "remote.dialect has not"
        )
    try:
        remote_options(settings).check(settings.sampling)
    except InvalidInput as error:
        raise ConfigurationError(f"sampling: {error}") from None
    if settings.remote.ca_file is not None and not settings.remote.ca_file.is_file():
        raise ConfigurationError(f"remote.ca_file {settings.remote.ca_file} is no file")


def remote_options(settings: Settings) -> OpenAIOptions:
    """The backend's options."""
    engine, remote = settings.engine, settings.remote
    keys = remote.api_keys * len(remote.endpoints) if len(remote.api_keys) == 1 else remote.api_keys
    endpoints = tuple(
        EndpointOptions(url, keys[number] if keys else None) for number, url in enumerate(remote.endpoints)
    )
    model = served_profile(settings)
    return OpenAIOptions(
        endpoints=endpoints,
        model=engine.model,
        revision=remote.revision,
        dialect=DIALECTS[remote.dialect],
        images=remote.images,
        logprobs=remote.logprobs,
        max_images_per_request=engine.max_images_per_request,
        max_num_seqs=engine.seats_elsewhere,
        max_concurrency=remote.max_concurrency,
        default_max_tokens=settings.sampling.max_tokens,
        affinity_slack=remote.affinity_slack,
        connect_timeout_s=remote.connect_timeout_s,
        read_timeout_s=remote.read_timeout_s,
        request_timeout_s=remote.request_timeout_s,
        max_attempts=remote.max_attempts,
        breaker_requests=remote.breaker_requests,
        breaker_wait_s=remote.breaker_wait_s,
        breaker_max_wait_s=remote.breaker_max_wait_s,
        ca_file=remote.ca_file,
        proxy=remote.proxy,
        raw_prompts=remote.raw_prompts,
        chat_template_kwargs=model.template_kwargs(model.profile),
        image_format=remote.image_format,
        sign_url=_signer(settings) if remote.image_transport == "presigned" else None,
    )


def build_remote_engine(settings: Settings) -> OpenAIEngine:
    """The backend, not started. Raises ConfigurationError as `check_remote`."""
    from nanovllm.engine.backends.openai.backend import OpenAIEngine

    check_remote(settings)
    return OpenAIEngine(remote_options(settings))


async def remote_findings(engine: OpenAIEngine, settings: Settings) -> list[Row]:
    """What each server answers now, and what its dialect has. Closes ``engine``.

    Endpoints fail where none has the model: a worker starts with one.
    """
    from nanovllm.engine.backends.openai.listings import smallest_context

    remote = settings.remote
    try:
        listings = await engine.listings()
    finally:
        await engine.close()
    answers = [answer for answer in listings.values() if not isinstance(answer, Exception)]
    names = {name for answer in answers for name in answer or ()}
    name = settings.engine.model or (names.pop() if len(names) == 1 else None)
    serving = [answer for answer in answers if _has_model(answer, name)]
    rows = [
        Row("backend", "openai (engine.backend openai)", "servers compute"),
        Row("dialect", remote.dialect, "remote.dialect"),
    ]
    for url, answer in listings.items():
        subject, fails = f"endpoint {url}", not serving
        if isinstance(answer, Exception):
            rows.append(Row(subject, "does not answer as it should", str(answer), fails))
        elif answer is None:
            note = "it has no list of models" + ("" if name else ", and engine.model is not set: name one")
            rows.append(Row(subject, "answers", note, fails))
        else:
            missing = f"it does not list {name}" if name else "engine.model is not set: name one"
            note = "" if _has_model(answer, name) else missing
            rows.append(Row(subject, f"answers, and lists {', '.join(sorted(answer)[:8]) or 'none'}", note, fails))
    context = smallest_context(answers, name, None) if name else None
    rows.append(
        Row("context", "not told", "the servers' lists do not say it, and they refuse what is too long")
        if context is None
        else Row("context", f"{context:,} tokens, prompt and output", "the least that a server lists")
    )
    at_once = f"engine.max_num_seqs; at one endpoint up to {remote.max_concurrency}, remote.max_concurrency"
    rows.append(Row("concurrency", f"up to {counted(settings.engine.seats_elsewhere, 'request')} at once", at_once))
    able = engine.capabilities
    rows.append(Row("guided output", ", ".join(kind for kind in GUIDED_KINDS if kind in able.guided)))
    lacks = ", ".join(sorted(SAMPLING_NAMES - able.sampling)) or "nothing"
    rows.append(Row("sampling", "as the servers sample", f"refused by name: {lacks}"))
    images = "as files" if able.images else "none"
    rows.append(Row("images", images, f"remote.image_transport {remote.image_transport}"))
    return rows


def _has_model(listed: Mapping[str, int | None] | None, name: str | None) -> bool:
    """Whether a server has the model ``name``; one without a list may have any, and no server has an unnamed one."""
    return name is not None and (listed is None or name in listed)


def _signer(settings: Settings) -> SignUrl:
    def make(s3: S3Settings) -> Any:
        client = make_client(s3)
        # botocore 1.44 presigns with version 2 where no version is set, which objects under a KMS key refuse.
        client.meta.events.register_first("choose-signer.s3.GetObject", lambda **_: "s3v4")
        return client

    client, seconds = S3Client(settings.s3, make), settings.remote.presigned_s

    def sign(uri: str, version_id: str) -> str:
        parts = split_object_uri(uri)
        assert parts is not None  # it was fetched from there
        which = {"Bucket": parts[0], "Key": parts[1], "VersionId": version_id}

        def generate(s3: Any) -> str:
            url: str = s3.generate_presigned_url("get_object", Params=which, ExpiresIn=seconds)
            return url

        return client.call(generate)

    return sign
