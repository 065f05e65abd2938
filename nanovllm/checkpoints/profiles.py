"""Profiles of document models: what their authors publish of prompts, sampling, pages and answers. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nanovllm.checkpoints.resolve import is_lfs_pointer
from nanovllm.errors import ConfigurationError
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER
from nanovllm.sampling_params import SamplingParams

Task = Literal["text", "markdown", "tables", "schema"]
Parser = Literal["as_written", "html_blocks", "grounded_blocks", "doctags", "otsl", "front_matter"]
SchemaForm = Literal["nuextract", "empty_values"]

NO_PROFILE = "none"
SCHEMA_PLACEHOLDER = "{schema}"
_SHIPPED = Path(__file__).parent / "assets" / "profiles"
_TEMPLATE_FILES = ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json")
"""In the order in which a processor, then a tokenizer of transformers 5 takes them; the first that has one counts."""
_TOKENIZER = "tokenizer.json"
_WORD_END = r"[-_.:@]"
_VERSION = r"v?\d{1,2}(?:\.\d+)*(?:$|[-_:@]|\.(?!\d))"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Names = Annotated[tuple[str, ...], Field(strict=False)]


class Match(_Frozen):
    """Which checkpoints a profile is of.

    Attributes:
        names: beginnings of the last part of a name on the hub, in lower case, to a word's end; what has a further
            version behind it is another model. Those of a family count where there are no files.
        model_types: ``model_type`` of config.json; a checkpoint has one of them, whatever else it is chosen by.
        is_family: ``model_types`` alone decide: the models that no other profile is nearer to.
        fields: further fields of config.json and their values, by dotted names.
        tokens: tokens that the tokenizer has.
        template_variables: variables that the chat template reads.
    """

    names: Names = ()
    model_types: Annotated[Names, Field(min_length=1)]
    is_family: bool = False
    fields: dict[str, str] = Field(default_factory=dict)
    tokens: Names = ()
    template_variables: Names = ()

    def is_named(self, name: str) -> bool:
        """Whether the last part of ``name`` is one of ``names``, or one with more words."""
        last = last_part(name)
        return any(
            re.fullmatch(rf"{re.escape(one)}(?:{_WORD_END}(?!{_VERSION}).*)?", last, re.DOTALL) for one in self.names
        )

    @property
    def tells_apart(self) -> bool:
        """Whether a checkpoint without a name can be told to be of this profile among others of its type."""
        return bool(self.fields or self.tokens or self.template_variables)


class TaskForm(_Frozen):
    """How a model is asked for one task, and what it answers.

    Attributes:
        prompt: with the place of the page; ``{schema}`` is the place of the schema in ``schema_as``.
        parser: the form of the answer.
        sampling: parameters that differ from those of the profile.
        chat_template_kwargs: variables that differ from those of the profile.
        schema_as: the form of a schema, in the prompt or in the variable ``template``.
        schema_types: types of leaves that the form knows beside text.
    """

    prompt: str
    parser: Parser = "as_written"
    sampling: dict[str, Any] = Field(default_factory=dict)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    schema_as: SchemaForm | None = None
    schema_types: Names = ()

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        if prompt.count(IMAGE_PLACEHOLDER) != 1:
            raise ValueError(f"has no single {IMAGE_PLACEHOLDER}")
        return prompt


class PageSize(_Frozen):
    """How pages are rendered where a route does not say: ``dpi``, or the pixels of the longer side; at most an area."""

    dpi: int | None = Field(None, ge=18, le=1_200)
    longest_side: int | None = Field(None, ge=1)
    max_pixels: int | None = Field(None, ge=1)


class Profile(_Frozen):
    """What is published of one model.

    Attributes:
        name: what settings and routes call it.
        title: what it is of, and what it does, in one line.
        sources: where each fact is published, with version or date.
        tasks: those that it can be asked for.
        free_instructions: whether it follows a prompt of the caller's own.
        several_pages: whether a prompt may have several pages.
        reads_regions: whether it is made for regions that a layout model cut out, not for pages.
        sampling: parameters below those of settings, routes and jobs, above generation_config.json.
        chat_template_kwargs: variables of the chat template below the settings'.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    title: str
    sources: Annotated[Names, Field(min_length=1)]
    match: Match
    tasks: dict[Task, TaskForm] = Field(default_factory=dict)
    free_instructions: bool = False
    several_pages: bool = False
    reads_regions: bool = False
    sampling: dict[str, Any] = Field(default_factory=dict)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    pages: PageSize = PageSize()

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.name == NO_PROFILE:
            raise ValueError(f"{NO_PROFILE} is no name of a profile")
        for sampling in (self.sampling, *(form.sampling for form in self.tasks.values())):
            SamplingParams.model_validate_json(json.dumps(sampling), strict=True)
        for task, form in self.tasks.items():
            if (task == "schema") != (form.schema_as is not None):
                raise ValueError(f"{task}: schema_as belongs to the task schema, and to no other")
        return self


@cache
def shipped_profiles() -> dict[str, Profile]:
    """The profiles that come with this package, by name."""
    found = (read_profile(file) for file in sorted(_SHIPPED.glob("*.yaml")))
    return {profile.name: profile for profile in found}


def read_profile(file: Path) -> Profile:
    """The profile of a YAML file, which is named as the profile is.

    Raises:
        ValueError: it is none.
    """
    profile = Profile.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    if profile.name != file.stem:
        raise ValueError(f"{file.name} holds the profile {profile.name}")
    return profile


def named_profile(name: str, setting: str) -> Profile | None:
    """The profile called ``name``; None for ``none``. ``setting`` names it in the error.

    Raises:
        ConfigurationError: there is none.
    """
    profiles = shipped_profiles()
    if name != NO_PROFILE and name not in profiles:
        raise ConfigurationError(f"{setting} {name!r} is none of {NO_PROFILE}, {', '.join(profiles)}")
    return profiles.get(name)


@dataclass(frozen=True)
class ProfileChoice:
    """A profile, or none, and why."""

    profile: Profile | None
    reason: str


def choose_profile(
    names: Sequence[str], fields: Mapping[str, Any] | None, directory: Path | None = None
) -> ProfileChoice:
    """The profile of a checkpoint by a hub name, what its files tell, or its family, in this order.

    Args:
        names: of the checkpoint, as on the hub or as servers list it; the last part of each counts.
        fields: config.json; None where there are only names.
        directory: of the checkpoint, whose templates and tokenizer are asked.

    What two profiles fit equally is none of both: the family's, if there is one.
    """
    kind = None if fields is None else str(fields.get("model_type"))
    of_type = [one for one in shipped_profiles().values() if fields is None or kind in one.match.model_types]
    for name in names:
        by_name = [one for one in of_type if one.match.is_named(name) and (fields is None or not one.match.is_family)]
        if len(by_name) == 1:
            return ProfileChoice(by_name[0], f"by the name {last_part(name)}")
    if fields is None:
        what = f"no profile is of the name {last_part(names[0])}" if names else "the model has no name"
        return ProfileChoice(None, f"{what}: engine.profile names one")
    told = [one for one in of_type if one.match.tells_apart and _is_told(one.match, fields, directory)]
    if len(told) == 1:
        return ProfileChoice(told[0], f"by its files: {', '.join(_signs(told[0].match, kind))}")
    equal = ", ".join(one.name for one in told)
    family = [one for one in of_type if one.match.is_family]
    chosen = family[0] if len(family) == 1 else None
    others = sorted(one.name for one in of_type if one is not chosen)
    hint = f"; a fine-tune of it has one by its name, or by engine.profile: {', '.join(others)}" if others else ""
    how = f"by its model_type, {kind}" if chosen is not None else f"there is none for model_type {kind} itself"
    if equal:
        return ProfileChoice(chosen, f"{how}; its files are those of {equal} alike: engine.profile names one")
    return ProfileChoice(chosen, f"{how}{hint}")


def template_reads(directory: Path, variable: str) -> bool:
    """Whether a chat template of a checkpoint reads ``variable``."""
    from nanovllm.checkpoints.template_files import template_variables  # jinja2 comes with engines alone

    return any(variable in template_variables(template) for template in _templates(directory))


def last_part(name: str) -> str:
    """The last part of a name on the hub, or of a path, in lower case."""
    return name.rstrip("/").rpartition("/")[2].lower()


def _is_told(match: Match, fields: Mapping[str, Any], directory: Path | None) -> bool:
    if any(_field(fields, place) != value for place, value in match.fields.items()):
        return False
    if directory is None:
        return not (match.tokens or match.template_variables)
    if match.tokens:
        text = _text_of(directory / _TOKENIZER)
        if not all(json.dumps(token) in text for token in match.tokens):
            return False
    return all(template_reads(directory, variable) for variable in match.template_variables)


def _signs(match: Match, kind: str | None) -> Iterator[str]:
    yield f"model_type {kind}"
    yield from (f"{place} {value}" for place, value in match.fields.items())
    yield from (f"the token {token}" for token in match.tokens)
    yield from (f"the template's variable {variable}" for variable in match.template_variables)


def _field(fields: Mapping[str, Any], place: str) -> Any:
    found: Any = fields
    for name in place.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _templates(directory: Path) -> tuple[str, ...]:
    """The chat templates of a checkpoint; none where it has none that can be read."""
    for name in _TEMPLATE_FILES:
        text = _text_of(directory / name)
        if name.endswith(".jinja"):
            found: Any = text
        else:
            try:
                fields = json.loads(text or "{}")
            except (ValueError, RecursionError):
                continue  # found at load, with its remedy
            found = fields.get("chat_template") if isinstance(fields, dict) else None
        if isinstance(found, list):
            return tuple(str(one.get("template")) for one in found if isinstance(one, dict))
        if found:
            return (str(found),)
    return ()


def _text_of(file: Path) -> str:
    if not file.is_file() or is_lfs_pointer(file):
        return ""
    return file.read_text(encoding="utf-8", errors="replace")
