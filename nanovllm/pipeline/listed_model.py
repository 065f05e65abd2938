"""Servers' lists of models, asked for once and before a start: whether one has the model, and its context."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace

from nanovllm.engine.backends.openai.faults import EndpointFault
from nanovllm.engine.backends.openai.options import OpenAIOptions
from nanovllm.errors import ConfigurationError, ModelNotFound
from nanovllm.pipeline.build_remote import check_remote, remote_options
from nanovllm.settings.worker import Settings

Listing = Mapping[str, int | None]
_SHOWN_NAMES = 8


@dataclass(frozen=True)
class ListedModel:
    """What servers say of the model: its smallest context in tokens (None: none tells one), and who does not have it.

    ``lacking`` are URLs and why: no answer, or no such model. ``is_served``: a server has it, or has no list.
    """

    context: int | None
    lacking: Mapping[str, str]
    is_served: bool


async def listed_model(settings: Settings) -> ListedModel:
    """The model of the servers, all asked at once and each for `remote.connect_timeout_s` at most.

    Raises:
        ModelNotFound: every server lists other models.
        ConfigurationError: as `check_remote`; a model must be named; every server refuses its key; or
            ``sampling.max_tokens`` leaves a prompt no room.
    """
    check_remote(settings)
    options = remote_options(settings)
    found = await asyncio.gather(*(_listing(replace(options, endpoints=(one,))) for one in options.endpoints))
    answers = {endpoint.url: answer for endpoint, answer in zip(options.endpoints, found, strict=True)}
    faults = {url: answer for url, answer in answers.items() if isinstance(answer, EndpointFault)}
    if all(answer.kind == "refused" for answer in faults.values()) and len(faults) == len(answers):
        said = "; ".join(f"{url} {fault}" for url, fault in faults.items())
        raise ConfigurationError(f"remote.api_keys: {said}")
    listings = {url: answer for url, answer in answers.items() if not isinstance(answer, EndpointFault)}
    lacking = {url: str(fault) for url, fault in faults.items()}
    if not listings:
        return ListedModel(None, lacking, is_served=False)
    model = settings.engine.model or _only_model(listings)
    having = [listing for listing in listings.values() if listing is None or model in listing]
    for url, listing in listings.items():
        if listing is not None and model not in listing:
            lacking[url] = f"does not serve {model}; it lists {_named(listing) or 'nothing'}"
            if not having and not faults:
                raise ModelNotFound(f"{url} {lacking[url]}: `NANOVLLM_ENGINE__MODEL` names one of these")
    contexts = (listing.get(model) for listing in having if listing is not None)
    context = min((context for context in contexts if context is not None), default=None)
    if context is not None and (settings.sampling.max_tokens or 0) >= context:
        raise ConfigurationError(
            f"sampling.max_tokens {settings.sampling.max_tokens} leaves no prompt any room: the servers have a context "
            f"of {context} tokens"
        )
    return ListedModel(context, lacking, is_served=bool(having))


async def _listing(options: OpenAIOptions) -> Listing | EndpointFault | None:
    """What the one endpoint of ``options`` lists; None where it has no list."""
    from nanovllm.engine.backends.openai.backend import OpenAIEngine

    engine = OpenAIEngine(options)
    try:
        async with asyncio.timeout(options.connect_timeout_s):
            (answer,) = (await engine.listings()).values()
        return answer
    except TimeoutError:
        return EndpointFault("timeout", "does not answer in time")
    finally:
        await engine.close()


def _only_model(listings: Mapping[str, Listing | None]) -> str:
    names = {name for listing in listings.values() for name in listing or ()}
    if len(names) != 1:
        raise ConfigurationError(
            f"engine.model is not set, and the endpoints list {len(names)} models: name one of {_named(names)}"
            if names
            else "engine.model is not set, and the endpoints have no list of models: name the model"
        )
    return names.pop()


def _named(names: Mapping[str, object] | set[str]) -> str:
    return ", ".join(sorted(names)[:_SHOWN_NAMES])
