"""The profile of the model that a worker serves: chosen by its checkpoint, unless a setting or a route names one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanovllm.checkpoints.profiles import (
    Profile,
    ProfileChoice,
    TaskForm,
    choose_profile,
    named_profile,
    template_reads,
)
from nanovllm.checkpoints.resolve import checkpoint_name, read_config, resolve_checkpoint
from nanovllm.engine.backends.openai.dialects import DIALECTS
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings.engine import DEFAULT_MODEL, EngineSettings
from nanovllm.settings.routes import Route
from nanovllm.settings.worker import Settings

_SHOWN_CHARS = 80


@dataclass(frozen=True)
class ModelProfile:
    """The profile of a model, or none, with the variables of its chat template that the settings give.

    ``directory`` is that of its checkpoint; None where servers have it. ``takes_variables``: whether requests may have
    variables of the chat template.
    """

    choice: ProfileChoice
    directory: Path | None
    own_template_kwargs: Mapping[str, Any]
    takes_variables: bool = True

    @property
    def profile(self) -> Profile | None:
        """The profile for jobs, and for routes that name none."""
        return self.choice.profile

    def of(self, route: Route) -> Profile | None:
        """The profile for a route. Raises ConfigurationError: it names one that there is not."""
        return self.profile if route.profile is None else named_profile(route.profile, f"route {route.name}: profile")

    def template_kwargs(self, profile: Profile | None, form: TaskForm | None = None) -> dict[str, Any]:
        """Variables of the chat template: those of ``profile`` and ``form`` that it reads, below the settings'."""
        if not self.takes_variables:
            return {}
        of_profile = {} if profile is None else profile.chat_template_kwargs
        of_form = {} if form is None else form.chat_template_kwargs
        known = {name: value for name, value in {**of_profile, **of_form}.items() if self._reads(name)}
        return {**known, **self.own_template_kwargs}

    def _reads(self, variable: str) -> bool:
        return self.directory is None or template_reads(self.directory, variable)


NO_MODEL_PROFILE = ModelProfile(ProfileChoice(None, "no model is asked"), None, {})


def model_profile(engine: EngineSettings, directory: Path | None = None) -> ModelProfile:
    """The profile for ``engine``; reads config.json, templates and tokenizer of a checkpoint, no weights.

    ``directory`` is that of the checkpoint, where it is known already.

    Raises:
        ConfigurationError: ``engine.profile`` is none that there is.
        ModelNotFound: the checkpoint is not there.
    """
    names = [engine.model] if engine.model else []
    if engine.loads_model or engine.backend == "vllm":
        model = engine.model or DEFAULT_MODEL
        directory = directory or resolve_checkpoint(engine.model_aliases.get(model, model))
        names = [checkpoint_name(directory), model]
    if engine.profile is not None:
        choice = ProfileChoice(named_profile(engine.profile, "engine.profile"), "by engine.profile")
    else:
        choice = choose_profile(names, None if directory is None else _config(directory), directory)
    return ModelProfile(choice, directory, engine.chat_template_kwargs)


def _config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint; empty where it is missing, which is found at load."""
    return read_config(directory) if (directory / "config.json").is_file() else {}


def served_profile(settings: Settings) -> ModelProfile:
    """The profile for ``settings``, with what servers take of it. Raises as `model_profile`."""
    is_remote = settings.engine.backend == "openai"
    takes = not is_remote or DIALECTS[settings.remote.dialect].template_kwargs
    return replace(model_profile(settings.engine), takes_variables=takes)


def heeded_sampling(profile: Profile | None, heeded: frozenset[str]) -> dict[str, Any]:
    """The sampling parameters of ``profile``, without those that an engine that heeds ``heeded`` has not."""
    always = {"temperature", "max_tokens"}
    found = {} if profile is None else profile.sampling
    return {name: value for name, value in _checked(found).items() if name in always or name in heeded}


def _checked(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """``sampling`` with the types of `SamplingParams`."""
    params = SamplingParams(**sampling)
    return {name: getattr(params, name) for name in sampling}


def profile_rows(model: ModelProfile) -> Iterator[tuple[str, str, str]]:
    """What ``nanovllm doctor`` says of a profile: subject, value, note."""
    profile, choice = model.profile, model.choice
    if profile is None:
        yield "profile", "none", choice.reason
        return
    yield "profile", f"{profile.name}: {profile.title}", f"{choice.reason}; engine.profile: none leaves it out"
    prompts = "follows prompts of a route's own" if profile.free_instructions else "follows its own prompts alone"
    pages = "several pages in a prompt" if profile.several_pages else "one page in a prompt"
    regions = "; made for regions that a layout model cut out, which a route has not" if profile.reads_regions else ""
    yield "profile tasks", ", ".join(profile.tasks) or "none", f"{prompts}, {pages}{regions}"
    for task, form in profile.tasks.items():
        prompt = form.prompt.replace("\n", "\\n")
        shown = prompt if len(prompt) <= _SHOWN_CHARS else f"{prompt[:_SHOWN_CHARS]}…"
        yield f"profile {task}", shown, f"answer: {form.parser.replace('_', ' ')}"
    sampling = ", ".join(f"{name} {value}" for name, value in sorted(profile.sampling.items()))
    order = "below settings, routes and jobs; above generation_config.json"
    yield "profile sampling", sampling or "as without", order if sampling else ""
    given = model.template_kwargs(profile)
    unread = sorted(profile.chat_template_kwargs.keys() - given.keys())
    yield (
        "profile template",
        ", ".join(f"{name} {value}" for name, value in given.items()) or "no variables",
        f"the chat template does not read {', '.join(unread)}" if unread else "",
    )
    size = profile.pages
    parts = [f"{size.dpi} dpi"] if size.dpi else []
    parts += [f"{size.longest_side} pixels on the longer side"] if size.longest_side else []
    parts += [f"at most {size.max_pixels:,} pixels"] if size.max_pixels else []
    yield "profile pages", ", ".join(parts) or "as routes say", "where a route does not say" if parts else ""
    for source in profile.sources:
        yield "profile source", source, ""
