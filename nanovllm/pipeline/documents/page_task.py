"""What a route asks the model for: its own prompt and values over those of the model's profile."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nanovllm.checkpoints.profiles import SCHEMA_PLACEHOLDER, PageSize, Parser, Profile, SchemaForm, TaskForm
from nanovllm.errors import ConfigurationError
from nanovllm.image_placeholder import IMAGE_PLACEHOLDER
from nanovllm.pipeline.documents.answers.reading import ReadAnswer, read_answer
from nanovllm.pipeline.documents.model_profile import ModelProfile
from nanovllm.pipeline.documents.schema_forms import empty_values, nuextract_template, unshown
from nanovllm.settings.located_yaml import Place
from nanovllm.settings.routes import LadderStep, Route
from nanovllm.vision.documents.pages import POINTS_PER_INCH, PageInfo

TEMPLATE_VARIABLE = "template"
"""The variable of a chat template that NuExtract's JSON templates stand in."""


@dataclass(frozen=True)
class PageTask:
    """How pages of a route are rendered and asked for, and how their answers are read.

    Attributes:
        prompt: with the place of the page.
        sampling: the route's, over what the profile says for the task alone.
        template_kwargs: variables of the chat template.
        schema_as: the form of a schema for the model, beside the constraint; None: the constraint alone.
        pages: what the profile says of rendering.
        tables_alone: of an answer its tables are kept.
    """

    prompt: str
    sampling: Mapping[str, Any] = field(default_factory=dict)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    parser: Parser = "as_written"
    schema_as: SchemaForm | None = None
    schema_types: frozenset[str] = frozenset()
    pages: PageSize = field(default_factory=PageSize)
    tables_alone: bool = False

    def prompt_of(self, pictures: int) -> str:
        """The prompt with the places of so many pages, one after the other."""
        return self.prompt.replace(IMAGE_PLACEHOLDER, pictures * IMAGE_PLACEHOLDER)

    def for_schema(self, prompt: str, schema: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
        """``prompt``, and the variables of the chat template, of a request for ``schema``."""
        variables = dict(self.template_kwargs)
        if schema is not None and self.schema_as == "nuextract":
            variables.setdefault(TEMPLATE_VARIABLE, _as_json(nuextract_template(schema, self.schema_types)))
        elif schema is not None and self.schema_as == "empty_values":
            prompt = prompt.replace(SCHEMA_PLACEHOLDER, _as_json(empty_values(schema)))
        return prompt, variables

    def read(self, text: str) -> ReadAnswer:
        """The answer ``text`` as Markdown."""
        return read_answer(self.parser, text, tables_alone=self.tables_alone)

    def dpi(self, route: Route, step: LadderStep, page: PageInfo) -> float:
        """The resolution of a page: the step's, the route's where it says one, the profile's, the default."""
        stated = step.dpi or (route.pages.dpi if "dpi" in route.pages.model_fields_set else self.pages.dpi)
        if stated is not None:
            return stated
        if self.pages.longest_side is not None:
            return self.pages.longest_side * POINTS_PER_INCH / max(page.width_pt, page.height_pt)
        return route.pages.dpi

    def max_pixels(self, route: Route, step: LadderStep) -> int | None:
        """The largest area of a rendered page; None: as large as it is."""
        side = self.pages.longest_side
        of_profile = self.pages.max_pixels or (None if side is None else side * side)
        return step.max_pixels or route.pages.max_pixels or of_profile


def page_task(route: Route, model: ModelProfile) -> PageTask:
    """What ``route`` asks of ``model``.

    Raises:
        ConfigurationError: its profile cannot do that; the first of `beyond_profile`.
    """
    for _, why in beyond_profile(route, model):
        raise ConfigurationError(f"route {route.name}: {why}")
    profile = model.of(route)
    form = _form(route, profile)
    prompt = route.prompt or (form.prompt if form is not None else "")
    if IMAGE_PLACEHOLDER not in prompt:
        prompt = f"{prompt} {IMAGE_PLACEHOLDER}"
    if form is None:
        pages = PageSize() if profile is None else profile.pages
        return PageTask(prompt, route.sampling, model.template_kwargs(profile), pages=pages)
    assert profile is not None
    is_own = _is_own_prompt(route, form)
    return PageTask(
        form.prompt if is_own else prompt,
        {**form.sampling, **route.sampling},
        model.template_kwargs(profile, form),
        form.parser if is_own else "as_written",
        form.schema_as if is_own else None,
        frozenset(form.schema_types),
        profile.pages,
        tables_alone=is_own and route.task == "tables" and not profile.reads_regions,
    )


def beyond_profile(route: Route, model: ModelProfile) -> Iterator[tuple[Place, str]]:
    """What of ``route`` its profile cannot do: the place in the route, and why, with the remedy."""
    try:
        profile = model.of(route)
    except ConfigurationError as error:
        yield ("profile",), str(error).removeprefix(f"route {route.name}: ")
        return
    if route.task == "tables" and route.text == "only_if_clean":
        yield ("text",), "text only_if_clean: a text layer has lines and no tables, as task tables wants: write ignore"
    if profile is None:
        if route.prompt is None:
            yield ("task",), f"task {route.task}: the model has no profile; write a prompt, or name a profile"
        return
    who, form = f"the profile {profile.name}", _form(route, profile)
    if form is None and (route.task is not None and not (profile.free_instructions and route.prompt is not None)):
        can = f"it has {', '.join(profile.tasks)}" if profile.tasks else "it has none of its own"
        free = ", or a prompt" if profile.free_instructions else ""
        yield ("task",), f"task {route.task}: {who} has no such task; {can}: write one of them{free}"
    if form is not None and form.schema_as == "nuextract" and not model.takes_variables:
        yield ("task",), f"task schema: {who} has schemas in its chat template, which remote.dialect cannot fill in"
    if form is not None and form.schema_as is not None and _is_own_prompt(route, form):
        yield from _unshown(route, model, who)
    if profile.free_instructions:
        return
    if route.prompt is not None and (form is None or not _is_own_prompt(route, form)):
        yield ("prompt",), f"prompt: {who} follows its own prompts alone: write task in its place ({_tasks(profile)})"
    if route.response_schema is not None and "schema" not in profile.tasks:
        yield ("response_schema",), f"response_schema: {who} answers no schema: leave it out, or take another model"
    if route.text == "hint" or (route.text == "only_if_clean" and route.response_schema is not None):
        yield ("text",), f"text {route.text}: {who} takes no text beside its own prompts: write text: ignore"
    if route.pages.request == "document" and not profile.several_pages:
        yield ("pages", "request"), f"pages.request document: {who} takes one page in a prompt: write page"


def _unshown(route: Route, model: ModelProfile, who: str) -> Iterator[tuple[Place, str]]:
    """Fields of the schema that the model would not be told of."""
    if route.response_schema is None or TEMPLATE_VARIABLE in model.own_template_kwargs:
        return
    if pointers := [pointer or "the whole" for pointer in unshown(route.response_schema)]:
        why = f"response_schema: {who} asks for fields by their names, and {', '.join(pointers[:8])} has none"
        yield ("response_schema",), f"{why}: write its properties, or take a model that follows a prompt"


def _form(route: Route, profile: Profile | None) -> TaskForm | None:
    if profile is None:
        return None
    if route.task is not None:
        return profile.tasks.get(route.task)
    if route.prompt is None:
        return None
    asked, has_schema = _bare(route.prompt), route.response_schema is not None
    forms = (form for form in profile.tasks.values() if (form.schema_as is not None) == has_schema)
    return next((form for form in forms if _bare(form.prompt) == asked), None)


def _is_own_prompt(route: Route, form: TaskForm) -> bool:
    """Whether the model is asked by the profile's own words."""
    return route.prompt is None or _bare(route.prompt) == _bare(form.prompt)


def _bare(prompt: str) -> str:
    return prompt.replace(IMAGE_PLACEHOLDER, "").strip()


def _tasks(profile: Profile) -> str:
    return ", ".join(profile.tasks) or "it has none"


def _as_json(value: Any) -> str:
    """JSON in which nothing is the place of a page."""
    written = json.dumps(value, indent=4, ensure_ascii=False)
    return written.replace(IMAGE_PLACEHOLDER, f"\\u{ord(IMAGE_PLACEHOLDER[0]):04x}{IMAGE_PLACEHOLDER[1:]}")
