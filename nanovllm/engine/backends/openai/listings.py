"""Lists of models that servers have: asked for, and the model of `engine.model` looked up in them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping, Sequence

from nanovllm.engine.backends.foreign_errors import shown
from nanovllm.engine.backends.openai.endpoint import Endpoint
from nanovllm.engine.backends.openai.faults import EndpointFault
from nanovllm.errors import ConfigurationError

Listing = Mapping[str, int | None]
"""Contexts of models by their names, in tokens; None where the server does not say it."""


async def ask_each(
    endpoints: Sequence[Endpoint], model: str, probe: bytes, timeout_s: float | None = None
) -> dict[Endpoint, Listing | EndpointFault | None]:
    """What each of ``endpoints`` lists, asked once; None where it has no list, but answers ``probe`` for ``model``.

    A busy one is left its time. ``timeout_s``: for each; None: as long as it takes.

    Raises:
        ConfigurationError: none of the addresses is one of a server.
    """
    asked = [endpoint for endpoint in endpoints if not endpoint.is_paused]
    questions = (_within(timeout_s, one.listing(model, probe)) for one in asked)
    found = await asyncio.gather(*questions, return_exceptions=True)
    answers: dict[Endpoint, Listing | EndpointFault | None] = {}
    for endpoint, answer in zip(asked, found, strict=True):
        if isinstance(answer, BaseException) and not isinstance(answer, EndpointFault):
            raise answer
        answers[endpoint] = answer
    faults = {one: answer for one, answer in answers.items() if isinstance(answer, EndpointFault)}
    if len(faults) == len(endpoints) and all(fault.kind == "missing" for fault in faults.values()):
        endpoint, fault = next(iter(faults.items()))
        raise ConfigurationError(f"remote.endpoints: {endpoint.url} has no /models, and to a request {fault}")
    return answers


async def _within(timeout_s: float | None, question: Awaitable[Listing | None]) -> Listing | None:
    try:
        async with asyncio.timeout(timeout_s):
            return await question
    except TimeoutError:
        raise EndpointFault("timeout", "does not answer in time") from None


def model_in(listings: Iterable[Listing | None], wanted: str | None) -> str:
    """The model ``wanted``, or the only one in ``listings``. Raises ConfigurationError: there is no such."""
    if wanted is not None:
        return wanted
    names = {name for listing in listings for name in listing or ()}
    if len(names) != 1:
        raise ConfigurationError(
            f"engine.model is not set, and the endpoints list {len(names)} models: name one of {_named(names)}"
            if names
            else "engine.model is not set, and the endpoints have no list of models: name the model"
        )
    return names.pop()


def lacks_model(listing: Listing | None, model: str) -> EndpointFault | None:
    """The fault of a server that lists others than ``model``."""
    if listing is None or model in listing:
        return None
    return EndpointFault("error", f"does not serve {model}; it lists {_named(listing) or 'nothing'}")


def smallest_context(listings: Iterable[Listing | None], model: str, max_tokens: int | None) -> int | None:
    """The smallest context of ``model`` in ``listings``, in tokens; None where no server says one.

    Raises:
        ConfigurationError: an answer of ``max_tokens`` would leave no prompt any room in it.
    """
    contexts = [listing.get(model) for listing in listings if listing is not None]
    context = min((context for context in contexts if context is not None), default=None)
    if context is not None and (max_tokens or 0) >= context:
        raise ConfigurationError(
            f"sampling.max_tokens {max_tokens} leaves no prompt any room: the servers have a context of "
            f"{context} tokens"
        )
    return context


def _named(models: Iterable[str]) -> str:
    return shown(", ".join(sorted(models)[:8]))
