"""``nanovllm routes``: routes as a proof, before the first document arrives."""

from __future__ import annotations

import asyncio
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanovllm.cli.extras import require
from nanovllm.cli.jobs import ConfigOption, JsonOption
from nanovllm.cli.run import ModelOption, engine_settings, require_engine
from nanovllm.errors import (
    ConfigurationError,
    EndpointsUnavailable,
    InvalidInput,
    InvalidRoutes,
    NanoVLLMError,
    counted,
)
from nanovllm.messages.s3_uri import split_object_uri
from nanovllm.pipeline.operations.stop_signals import DONE, FAILED
from nanovllm.pipeline.routing.routes import RouteEntry, Routes, load_routes, read_routes
from nanovllm.sampling_params import CONSTRAINTS
from nanovllm.settings.routes import Route
from nanovllm.settings.worker import Settings
from nanovllm.terminal import long_work, plain, print_json, print_table

if TYPE_CHECKING:
    from nanovllm.engine.backends.base import EngineBackend
    from nanovllm.pipeline.documents.page_sizes import Points
    from nanovllm.pipeline.route_checks import RouteCheck, TokenBudget
    from nanovllm.pipeline.route_costs import Cost

MISUSE = 2
DOCUMENT_PAGES = 6
"""No multiple of the pages that are asked at once: the last ones of a document leave a gap, as they usually do."""
SCAN_DPI = 150
COLUMNS = ("route", "what", "is")
_PAPERS = {"a4": (595.0, 842.0), "a3": (842.0, 1191.0), "letter": (612.0, 792.0)}

routes_app = typer.Typer(no_args_is_help=True, help="Check the routes of documents.")


@routes_app.command("check")
def routes_check(
    file: Annotated[Path, typer.Argument(help="YAML file of routes.")],
    object: Annotated[
        str | None, typer.Option("--object", help="Only say which route takes this s3://bucket/key.")
    ] = None,
    content_type: Annotated[str | None, typer.Option(help="Content type of that object.")] = None,
    size: Annotated[int | None, typer.Option(min=0, help="Bytes of that object.")] = None,
    page: Annotated[str, typer.Option(help="Size of a usual page: a4, a3, letter, or WIDTHxHEIGHT in points.")] = "a4",
    measure: Annotated[
        bool, typer.Option("--measure", help="Extract synthetic documents, and say what 1,000 pages would take.")
    ] = False,
    document_pages: Annotated[int, typer.Option(min=1, help="Pages of a measured document.")] = DOCUMENT_PAGES,
    pages: Annotated[
        int | None,
        typer.Option(min=1, help="Pages measured in each of three rounds; unset: as many as are asked at once."),
    ] = None,
    model: ModelOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Prove that each object has one route, that no route feeds itself, and that each fits the model.

    Each refusal is one line with file and line number, and makes exit code 2. With --object, exit code 1: no route.
    """
    points = _points(page)
    if object is not None:
        raise typer.Exit(_show_route(load_routes(file), object, content_type, size, as_json))
    routes = read_routes(file)
    settings = engine_settings(config, model)
    rows = list(_check(routes, settings, points, (document_pages, pages) if measure else None))
    print_table(COLUMNS, rows, as_json=as_json)


def named_entry(routes: Routes, name: str) -> RouteEntry:
    """The route that ``--route`` names. Raises InvalidInput: there is none."""
    found = {entry.route.name: entry for entry in routes.entries}
    if name not in found:
        raise InvalidInput(f"--route {plain(name).plain} is none of {', '.join(found)}")
    return found[name]


def _points(page: str) -> Points:
    if page.lower() in _PAPERS:
        return _PAPERS[page.lower()]
    sides = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", page)
    if sides is None:
        raise InvalidInput(f"--page {page}: give {', '.join(_PAPERS)}, or WIDTHxHEIGHT in points, such as 595x842")
    return float(sides[1]), float(sides[2])


def _show_route(routes: Routes, uri: str, content_type: str | None, size: int | None, as_json: bool) -> int:
    parts = split_object_uri(uri)
    if parts is None:
        raise InvalidInput(f"--object {uri}: give the s3://bucket/key of one object")
    route = routes.route_of(*parts, content_type, size)
    why_not = {one.route.name: one.why_not(*parts, content_type, size) for one in routes.entries}
    if as_json:
        print_json({"object": uri, "route": route and route.name, "why_not": {k: v for k, v in why_not.items() if v}})
    elif route is not None:
        (entry,) = (one for one in routes.entries if one.route is route)
        print(f"{plain(uri).plain}: route {route.name} ({routes.source.path}:{entry.line})")
    else:
        print(f"nanovllm: no route takes {plain(uri).plain}", file=sys.stderr)
        for name, why in why_not.items():
            print(f"nanovllm: route {name} does not: {plain(str(why)).plain}", file=sys.stderr)
    return FAILED if route is None else DONE


def _check(
    routes: Routes, settings: Settings, points: Points, measured: tuple[int, int | None] | None
) -> Iterator[tuple[str, str, str]]:
    """The rows of what holds; ``measured`` are pages of a document and of a round.

    Raises:
        InvalidRoutes: with everything that does not hold.
    """
    try:
        require_engine(settings)
    except ConfigurationError:
        if routes.refusals:
            raise InvalidRoutes(routes.refusals) from None
        raise
    from nanovllm.pipeline.app import prepare_threads

    prepare_threads()
    from nanovllm.pipeline.build_remote import build_remote_engine
    from nanovllm.pipeline.listed_model import listed_model
    from nanovllm.pipeline.route_checks import check_routes

    is_remote = settings.engine.backend == "openai"
    with long_work("checking the routes"):
        served = asyncio.run(listed_model(settings)) if is_remote else None
        checks = check_routes(routes, settings, points, context=None if served is None else served.context)
    if served is not None and not served.is_served and measured is not None:
        raise EndpointsUnavailable("; ".join(f"{url} {why}" for url, why in served.lacking.items()))
    costs: dict[RouteEntry, Cost] = {}
    if measured is not None:
        require("documents", "pypdfium2", "jsonschema_rs")
        from nanovllm.pipeline.route_costs import measure, pages_at_once

        document_pages, pages = measured
        with long_work("loading and measuring the engine"):
            if is_remote:
                backend: EngineBackend = build_remote_engine(settings)
            else:
                backend, checks = _loaded(routes, settings, points)
            costs = measure(
                backend,
                {entry: entry.route for entry in routes.entries},
                settings,
                partial(receipts_document, points),
                pages=pages or pages_at_once(settings, backend.max_num_seqs, document_pages),
                document_pages=document_pages,
            )
    if not settings.s3.allow:
        yield "", "s3.allow", "not set: a worker reads the buckets of its routes, and for jobs no object"
    if served is not None:
        for url, why in served.lacking.items():
            yield "", f"endpoint {url}", why
        if not served.is_served:
            yield "", "servers", "none has the model now: its name and context are not checked, and a worker would wait"
        yield "", "tokens", "estimated, by characters and pixels: the servers count them otherwise"
    if is_remote and routes.page_store is not None and "revision" not in settings.remote.model_fields_set:
        yield "", "remote.revision", "not set: pages that are kept stay when the servers get another model of this name"
    for entry, check in checks.items():
        yield from _rows(entry, check, costs.get(entry))


def _loaded(routes: Routes, settings: Settings, points: Points) -> tuple[EngineBackend, dict[RouteEntry, RouteCheck]]:
    """The engine of this process, and the checks by its own limits: its KV cache is there. Raises InvalidRoutes."""
    from nanovllm.engine.backends.native import AsyncEngine
    from nanovllm.pipeline.build import build_engine, checkpoint_directory
    from nanovllm.pipeline.build_vllm import build_vllm_engine
    from nanovllm.pipeline.model_limits import limits_of
    from nanovllm.pipeline.route_checks import check_route, check_routes

    if settings.engine.backend == "vllm":
        backend = build_vllm_engine(settings, checkpoint_directory(settings.engine))
        try:
            return backend, check_routes(routes, settings, points, context=backend.capabilities.context)
        except NanoVLLMError:
            asyncio.run(backend.close())
            raise
    engine = build_engine(settings.engine)
    limits = limits_of(engine)
    checks = {one: check_route(routes, one, limits, settings, points) for one in routes.entries}
    if refusals := dict.fromkeys(refusal for check in checks.values() for refusal in check.refusals):
        engine.close()
        raise InvalidRoutes(refusals)
    return AsyncEngine(engine, step_timeout_s=settings.engine.step_timeout_s), checks


def _rows(entry: RouteEntry, check: RouteCheck, cost: Cost | None) -> Iterator[tuple[str, str, str]]:
    route, match = entry.route, entry.route.match
    name = route.name
    conditions = [f"not {', '.join(match.exclude)}"] if match.exclude else []
    conditions += [" or ".join(match.content_type)] if match.content_type else []
    if match.min_bytes or match.max_bytes is not None:
        conditions.append(
            f"{match.min_bytes:,} to {'any' if match.max_bytes is None else f'{match.max_bytes:,}'} bytes"
        )
    objects = ", ".join(f"s3://{bucket}/{key}" for bucket in match.bucket for key in match.key)
    yield name, "takes", "; ".join([objects, *conditions])
    yield name, "writes", "no sidecar" if route.sidecar is None else route.sidecar.template
    yield name, "constraint", _constraint(route.job_sampling, check.budget)
    asked = "its prompt" if route.task is None else f"the task {route.task}"
    yield name, "asks by", f"{asked}, profile {check.profile}"
    if (budget := check.budget) is not None:
        yield from ((name, what, said) for what, said in _budget_rows(route, budget))
    if check.warning is not None:
        yield name, "warning", check.warning
    if cost is not None:
        mean, least, most = cost.of(1_000)
        yield name, "seconds of 1,000 pages", f"{mean:.1f}"
        yield name, "by rounds", f"{least:.1f} to {most:.1f}"
        cut = f", {counted(cost.incomplete_pages, 'page')} without a whole one" if cost.incomplete_pages else ""
        yield name, "answers", f"{min(cost.answer_tokens)} to {max(cost.answer_tokens)} tokens{cut}"
    yield name, "digest", route.digest


def _constraint(sampling: Mapping[str, Any], budget: TokenBudget | None) -> str:
    constraint = next((one for one in CONSTRAINTS if sampling.get(one) is not None), None)
    if constraint is None:
        return "none"
    return f"{constraint}, compiled by the servers" if budget and budget.is_estimate else f"{constraint} compiles"


def _budget_rows(route: Route, budget: TokenBudget) -> Iterator[tuple[str, str]]:
    about, limit = "about " if budget.is_estimate else "", budget.max_model_len
    yield "page", f"{about}{budget.page_tokens:,} tokens at {budget.dpi:.4g} dpi, {budget.most_page_tokens:,} at most"
    hint = f" + {budget.hint_tokens:,} of its text" if budget.hint_tokens else ""
    parts = f"{budget.prompt_tokens:,} of prompt + {budget.most_page_tokens:,} of a page{hint}"
    whole = f"{about}{parts} + {budget.max_tokens:,} of answer = {budget.total:,}"
    yield "tokens", f"{whole} of {'what the servers take, which they do not tell' if limit is None else f'{limit:,}'}"
    if not budget.fits:
        yield "fit", "may be too long: lower pages.max_pixels, pages.dpi, sampling.max_tokens or hint_tokens"
    if route.pages.request == "document":
        yield "prompts", f"up to {about}{counted(budget.pages_a_prompt, 'page')} each"


def receipts_document(points: Points, numbers: Sequence[int]) -> bytes:
    """A scan of receipts as a PDF; no two numbers are alike, so that no cache has an embedding of a page."""
    from nanovllm.training import synthetic

    width, height = (max(1, round(side / 72 * SCAN_DPI)) for side in points)
    receipts = [synthetic.receipt(synthetic.generator(one, seed=0, split="heldout"), "heldout") for one in numbers]
    scans = [receipt.image.resize((width, height)) for receipt in receipts]
    file = io.BytesIO()
    scans[0].save(file, "PDF", save_all=True, append_images=scans[1:], resolution=SCAN_DPI)
    return file.getvalue()
