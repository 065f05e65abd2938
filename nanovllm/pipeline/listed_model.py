"""Servers' lists of models, asked for once and before a start: whether one has the model, and its context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nanovllm.engine.backends.openai.faults import EndpointFault
from nanovllm.engine.backends.openai.listings import lacks_model, model_in, smallest_context
from nanovllm.errors import ConfigurationError, ModelNotFound
from nanovllm.pipeline.build_remote import check_remote, remote_options
from nanovllm.settings.worker import Settings


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
    from nanovllm.engine.backends.openai.backend import OpenAIEngine

    check_remote(settings)
    options = remote_options(settings)
    engine = OpenAIEngine(options)
    try:
        answers = await engine.listings(options.connect_timeout_s)
    finally:
        await engine.close()
    faults = {url: answer for url, answer in answers.items() if isinstance(answer, EndpointFault)}
    if all(answer.kind == "refused" for answer in faults.values()) and len(faults) == len(answers):
        said = "; ".join(f"{url} {fault}" for url, fault in faults.items())
        raise ConfigurationError(f"remote.api_keys: {said}")
    listings = {url: answer for url, answer in answers.items() if not isinstance(answer, EndpointFault)}
    lacking = {url: str(fault) for url, fault in faults.items()}
    if not listings:
        return ListedModel(None, lacking, is_served=False)
    model = model_in(listings.values(), settings.engine.model)
    missing = {url: str(why) for url, found in listings.items() if (why := lacks_model(found, model)) is not None}
    if len(missing) == len(answers):
        url, said = next(iter(missing.items()))
        raise ModelNotFound(f"{url} {said}: `NANOVLLM_ENGINE__MODEL` names one of these")
    having = [found for url, found in listings.items() if url not in missing]
    context = smallest_context(having, model, settings.sampling.max_tokens)
    return ListedModel(context, lacking | missing, is_served=bool(having))
