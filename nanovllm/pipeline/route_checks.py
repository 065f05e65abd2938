"""Checks of routes against the settings and the model: what would fail or loop while documents arrive.

Pure routes are held against one another when they are read (`nanovllm.pipeline.routing.routes`). Here come the topics
and prefixes of the settings, the compilation of schemas, and the tokens of the largest page. The model's files are
read, never its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from nanovllm.checkpoints.profiles import NO_PROFILE, Profile
from nanovllm.errors import ConfigurationError, InvalidInput, InvalidRoutes, UnsupportedConstraint
from nanovllm.messages.job import Job
from nanovllm.messages.s3_uri import split_prefix_uri
from nanovllm.messages.validation import describe_errors
from nanovllm.pipeline import build
from nanovllm.pipeline.build_documents import short_answers
from nanovllm.pipeline.documents.merging import merged_schema
from nanovllm.pipeline.documents.model_profile import heeded_sampling, served_profile
from nanovllm.pipeline.documents.page_answers import with_text
from nanovllm.pipeline.documents.page_sizes import A4, Points, rendered_size
from nanovllm.pipeline.documents.page_task import PageTask, beyond_profile, page_task
from nanovllm.pipeline.documents.validation import SchemaValidator
from nanovllm.pipeline.model_limits import ModelLimits, model_limits, most_tokens, vllm_limits
from nanovllm.pipeline.routing.key_sets import KeySet
from nanovllm.pipeline.routing.routes import RouteEntry, Routes, below, example_object, loops
from nanovllm.pipeline.server_limits import ServerLimits, server_limits
from nanovllm.pipeline.stages.admit import sampling_defaults
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings.located_yaml import Place
from nanovllm.settings.routes import LadderStep, Route
from nanovllm.settings.worker import Settings
from nanovllm.vision.documents.pages import PageInfo

if TYPE_CHECKING:
    pass

RouteLimits = ModelLimits | ServerLimits


def check_settings(routes: Routes, settings: Settings) -> Iterator[str]:
    """What of the routes contradicts the settings: topics with another use, objects that may not be read, loops."""
    topics = settings.topics
    taken = {topics.metrics, topics.dead_letters, topics.events, topics.in_flight, topics.replayed}
    taken |= set(build.RetryTopics.of(settings).lanes)
    for entry in routes.entries:
        for name in ("result_topic", "review_topic"):
            if (topic := getattr(entry.route, name)) in taken:
                why = f"{name}: the worker uses the topic {topic} for something else: give records a topic of their own"
                yield routes.refusal(entry, why, name)
        if settings.s3.allow:
            yield from _unreadable(routes, entry, settings.s3.allow)
    yield from loops(routes, settings.s3.large_results)


def _unreadable(routes: Routes, entry: RouteEntry, allow: tuple[str, ...]) -> Iterator[str]:
    entries = [parts for uri in allow if (parts := split_prefix_uri(uri)) is not None]
    for bucket in entry.route.match.bucket:
        readable = [below(prefix, and_itself=True).include for name, prefix in entries if name == bucket]
        unreadable = KeySet(entry.keys.include, sum(readable, start=entry.keys.exclude))
        example = example_object(bucket, unreadable)
        if example is not None:
            why = f"takes {example}, which s3.allow does not let a worker read"
            yield routes.refusal(entry, why, "match", "bucket")


@dataclass(frozen=True)
class TokenBudget:
    """The tokens of a route's longest prompt of one page, and how many the model takes.

    ``page_tokens`` are those of a page of the size in question at ``dpi``, ``most_page_tokens`` those that no page
    exceeds: by estimate where ``is_estimate``. ``max_model_len`` None: servers do not tell it.
    """

    prompt_tokens: int
    page_tokens: int
    most_page_tokens: int
    hint_tokens: int
    max_tokens: int
    max_model_len: int | None
    pages_a_prompt: int
    dpi: float
    is_estimate: bool = False

    @property
    def fits(self) -> bool:
        """Whether it is not known to be, or estimated, beyond what the model takes."""
        return self.max_model_len is None or self.total <= self.max_model_len

    @property
    def total(self) -> int:
        """Prompt, largest page, text layer and answer."""
        return self.prompt_tokens + self.most_page_tokens + self.hint_tokens + self.max_tokens


@dataclass(frozen=True)
class RouteCheck:
    """What became of one route: its refusals, its budget where that could be told, its profile's name, a warning."""

    refusals: tuple[str, ...]
    budget: TokenBudget | None = None
    profile: str = NO_PROFILE
    warning: str | None = None


@contextmanager
def route_limits(settings: Settings, context: int | None = None) -> Iterator[RouteLimits]:
    """The limits of the model in this process, or of servers.

    ``context`` are the tokens that servers, or vLLM, have; None: they have not told it.

    Raises:
        ConfigurationError: as `model_limits` and `vllm_limits`; an engine that reads no pages.
    """
    if settings.engine.loads_model:
        with model_limits(settings) as limits:
            yield limits
    elif settings.engine.backend == "vllm":
        build.check_parts(settings)
        with vllm_limits(settings, context) as limits:
            yield limits
    elif settings.engine.backend == "openai":
        yield server_limits(settings, context)
    else:
        raise ConfigurationError(
            f"routes need an engine that reads pages; engine.backend is {settings.engine.backend}: take native, "
            "generic, openai or vllm"
        )


def check_routes(
    routes: Routes, settings: Settings, points: Points = A4, *, context: int | None = None
) -> dict[RouteEntry, RouteCheck]:
    """Every route held against the others, the settings, and the model by its files, or what servers can do.

    ``points``: see `check_route`; ``context``: see `route_limits`.

    Raises:
        InvalidRoutes: with everything that does not hold.
        ConfigurationError: as `route_limits`.
    """
    refusals = [*routes.refusals, *check_settings(routes, settings)]
    try:
        with route_limits(settings, context) as limits:
            checks = {one: check_route(routes, one, limits, settings, points) for one in routes.entries}
    except ConfigurationError:
        if refusals:  # of the file: they are to be mended whatever the engine is
            raise InvalidRoutes(dict.fromkeys(refusals)) from None
        raise
    refusals += [refusal for check in checks.values() for refusal in check.refusals]
    if refusals:
        raise InvalidRoutes(dict.fromkeys(refusals))
    return checks


def check_route(
    routes: Routes, entry: RouteEntry, limits: RouteLimits, settings: Settings, points: Points = A4
) -> RouteCheck:
    """Whether the model's profile has what the route asks for, and the model takes the route's schema and sampling, and
    its largest page with prompt and answer.

    ``points`` are width and height of a usual page. Of estimated tokens the answer's alone refuse a route.
    """
    route, model = entry.route, served_profile(settings)
    if not limits.takes_images:
        why = "the model takes no images: see engine.model and engine.max_images_per_request"
        return RouteCheck((routes.refusal(entry, why),))
    if beyond := [routes.refusal(entry, why, *place) for place, why in beyond_profile(route, model)]:
        return RouteCheck(tuple(beyond))
    profile = model.of(route)
    try:
        task = page_task(route, model)
        sampling = page_sampling(route, task, profile, limits, settings)
    except InvalidInput as error:
        return RouteCheck((routes.refusal(entry, str(error), "sampling", "max_tokens"),))
    refusals = []
    for parameter, why in limits.lacking(sampling):
        where = ["response_schema"] if parameter == "json_schema" else ["sampling", parameter]
        refusals.append(routes.refusal(entry, f"{'.'.join(where)} {why}", *where))
    try:
        if not refusals and route.response_schema is not None:
            SchemaValidator(merged_schema(route.response_schema, route.merge))
    except UnsupportedConstraint as error:
        refusals.append(routes.refusal(entry, f"response_schema: {error}", "response_schema"))
    refusals += [
        routes.refusal(entry, why, *place) for place, why in _unrenderable(route, task, limits, settings, points)
    ]
    if refusals:
        return RouteCheck(tuple(refusals))
    try:
        budget, place = token_budget(route, task, limits, settings, sampling, points)
    except InvalidInput as error:
        return RouteCheck((routes.refusal(entry, f"prompt: {error}", "prompt"),))
    named = NO_PROFILE if profile is None else profile.name
    stated = {*heeded_sampling(profile, limits.heeded), *limits.generation_defaults}
    warning = short_answers(route, task, stated, settings)
    if budget.fits or budget.max_model_len is None:
        return RouteCheck((), budget, named, warning)
    if isinstance(limits, ModelLimits):
        why = (
            f"{budget.prompt_tokens} tokens of prompt, up to {budget.most_page_tokens} of a page"
            f"{f', {budget.hint_tokens} of its text' if budget.hint_tokens else ''} and {budget.max_tokens} of answer "
            f"are {budget.total}, and the model takes {budget.max_model_len}: {_remedy(budget, limits)}"
        )
        return RouteCheck((routes.refusal(entry, why, *place, "max_pixels"),), budget)
    if budget.max_tokens >= budget.max_model_len:
        why = f"{budget.max_tokens} tokens of answer leave no room in the {budget.max_model_len} that the servers have"
        return RouteCheck((routes.refusal(entry, why, "sampling", "max_tokens"),), budget)
    return RouteCheck((), budget, named, warning)


def page_sampling(
    route: Route, task: PageTask, profile: Profile | None, limits: RouteLimits, settings: Settings
) -> SamplingParams:
    """The sampling of a page of ``route``, as a worker decides it. Raises InvalidInput: it asks for too much."""
    schema = {} if route.response_schema is None else {"json_schema": route.response_schema}
    try:
        job = Job(job_id="page", prompt=task.prompt, sampling={**task.sampling, **schema})
    except ValidationError as error:
        raise InvalidInput(describe_errors(error, "sampling")) from None
    of_profile = heeded_sampling(profile, limits.heeded)
    defaults = sampling_defaults(settings, limits.generation_defaults, of_profile)
    return job.sampling_params(defaults, settings.admission.max_tokens)


def token_budget(
    route: Route,
    task: PageTask,
    limits: RouteLimits,
    settings: Settings,
    sampling: SamplingParams,
    points: Points,
) -> tuple[TokenBudget, Place]:
    """The tokens of a prompt with one page, and which part of the route allows the largest page.

    Raises:
        InvalidInput: the model cannot take the prompt at all.
    """
    prompt, variables = task.for_schema(task.prompt, route.response_schema)
    alone = limits.text_tokens(prompt, variables)
    two, _ = task.for_schema(task.prompt_of(2), route.response_schema)
    around = limits.text_tokens(two, variables) - alone
    one = limits.text_tokens(with_text(prompt, "."), variables) if route.text == "hint" else alone
    resolutions = list(_resolutions(route, task, settings, points))
    _, dpi, usual_area = resolutions[0]
    pages = [(limits.most_tokens(dpi, area, points), place) for place, dpi, area in resolutions]
    most, place = max(pages, key=lambda page: page[0])
    hint = route.hint_tokens if route.text == "hint" else 0
    answer = sampling.max_tokens or settings.admission.max_tokens
    fit = limits.max_images
    if limits.max_model_len is not None:
        fit = min(fit, (limits.max_model_len - answer - one + around) // (most + around + hint))
    budget = TokenBudget(
        prompt_tokens=one,
        page_tokens=limits.page_tokens(*rendered_size(points, dpi, usual_area)),
        most_page_tokens=most,
        hint_tokens=hint,
        max_tokens=answer,
        max_model_len=limits.max_model_len,
        pages_a_prompt=max(0, fit) if route.pages.request == "document" else 1,
        dpi=dpi,
        is_estimate=limits.is_estimate,
    )
    return budget, place


def _resolutions(
    route: Route, task: PageTask, settings: Settings, points: Points
) -> Iterator[tuple[Place, float, int]]:
    """Every resolution of a usual page, and largest area, and where the route says so."""
    page, limit = PageInfo(1, *points), settings.images.max_pixels
    for number, step in enumerate((LadderStep(), *route.ladder)):
        place: Place = ("ladder", number - 1) if number else ("pages",)
        if not number or step.dpi is not None or step.max_pixels is not None:
            yield place, task.dpi(route, step, page), min(limit, task.max_pixels(route, step) or limit)


def _unrenderable(
    route: Route, task: PageTask, limits: RouteLimits, settings: Settings, points: Points
) -> Iterator[tuple[Place, str]]:
    """Why the model's preprocessing refuses a usual page, at each resolution."""
    for place, dpi, max_pixels in _resolutions(route, task, settings, points):
        try:
            limits.page_tokens(*rendered_size(points, dpi, max_pixels))
        except InvalidInput as error:
            yield place, f"a page of {points[0]:g}x{points[1]:g} points at {dpi:.4g} dpi: {error}"


def _remedy(budget: TokenBudget, limits: ModelLimits) -> str:
    room = limits.max_model_len - (budget.total - budget.most_page_tokens)
    transform = limits.transform
    if transform is not None and transform.resize == "pixel_budget" and most_tokens(limits, 1) <= room:
        fits, too_many = 1, transform.size[1]
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            fits, too_many = (middle, too_many) if most_tokens(limits, middle) <= room else (fits, middle)
        return f"pages.max_pixels {fits} fits, or lower sampling.max_tokens"
    if transform is not None and transform.resize is None:
        return "lower pages.max_pixels, sampling.max_tokens or hint_tokens, or shorten the prompt"
    return "shorten the prompt, or lower sampling.max_tokens or hint_tokens"
