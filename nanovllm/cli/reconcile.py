"""``nanovllm reconcile``: objects without records are found and submitted, or reported by the exit code."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from nanovllm.cli.jobs import BrokersOption, ConfigOption, JsonOption, client_settings
from nanovllm.cli.routes import named_entry
from nanovllm.client.connection import recovering_producer
from nanovllm.client.reconcile import SUBMITTED, Reconciler, Tally, Unfinished, created_event
from nanovllm.errors import InvalidInput
from nanovllm.kafka.topic_presence import require_topics
from nanovllm.messages.s3_uri import split_object_uri, split_prefix_uri
from nanovllm.objects.inventory import list_inventory, read_manifest
from nanovllm.objects.listing import ObjectPattern, list_objects
from nanovllm.objects.s3_client import S3Client, check_settings, make_client
from nanovllm.pipeline.routing.routes import RouteEntry, load_routes
from nanovllm.settings.kafka import KafkaSettings
from nanovllm.settings.worker import Settings
from nanovllm.sinks.kafka import KafkaSink
from nanovllm.terminal import long_work, plain, print_json

BATCH_EVENTS = 256
BESIDE = "s3://{bucket}/{key}.json"
"""Where records lie, unless something says otherwise."""


def reconcile(
    objects: Annotated[str, typer.Argument(help="s3://bucket, s3://bucket/prefix, or a glob such as …/**/*.pdf.")],
    route: Annotated[
        str | None,
        typer.Option("--route", help="Name of the route whose objects and records these are; its digest counts."),
    ] = None,
    routes_file: Annotated[
        Path | None, typer.Option("--routes", "-r", help="YAML file of routes; documents.routes if unset.")
    ] = None,
    sidecars: Annotated[
        str | None,
        typer.Option(
            help="Without a route, where records lie: s3://… with the object's {key} and, where needed, {bucket}; "
            f"{BESIDE} if unset."
        ),
    ] = None,
    inventory: Annotated[
        str | None, typer.Option(help="manifest.json of an S3 Inventory to take objects from: no listing is made.")
    ] = None,
    route_digest: Annotated[
        str | None,
        typer.Option(help="Without a route: records of another route digest do not count; unset: all do."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Submit nothing; exit code 1 when an object has no record.")
    ] = False,
    topic: Annotated[
        str | None, typer.Option(help="Topic to which the objects are submitted; topics.events if unset.")
    ] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    bootstrap_servers: BrokersOption = None,
) -> None:
    """Find objects without a record of what they are now, and submit each as an event of its creation.

    Each is printed with its state; exit code 1 when objects are left that no event would help.
    """
    if route is not None and (sidecars is not None or route_digest is not None):
        raise InvalidInput(
            "--route says where its records lie and their digest: leave out --sidecars and --route-digest"
        )
    settings = client_settings(config, bootstrap_servers)
    entry = _entry(route, routes_file, settings)
    pattern = _pattern(objects)
    check_settings(settings.s3)
    s3 = settings.s3
    client = S3Client(s3, partial(make_client, max_attempts=s3.max_attempts))
    if entry is None:
        reconciler = Reconciler(client, sidecars or BESIDE, route_digest=route_digest)
    else:
        reconciler = _reconciler_of(entry, client)
    if inventory is None:
        listed = list_objects(s3, pattern)
    else:
        listed = list_inventory(client, read_manifest(client, inventory), pattern)
    if entry is not None:
        listed = (one for one in listed if entry.may_take(*(split_object_uri(one.uri) or ("", ""))))
    with long_work(f"comparing {plain(objects).plain} with its records"):
        found = _printed(reconciler.unfinished(listed), as_json)
        if check:
            for _ in found:
                pass
            submitted = 0
        else:
            submitted = asyncio.run(_submit(settings.kafka, topic or settings.topics.events, found))
    tally = reconciler.tally
    if not tally.has_compared:
        # Else a misspelled prefix would prove that nothing is missing.
        which = "" if entry is None else f" that route {entry.route.name} takes"
        raise InvalidInput(
            f"{plain(objects).plain} names no object{which}: give a prefix, or a glob such as s3://b/in/**/*.pdf"
        )
    _print_summary(tally, submitted, as_json)
    is_left = not tally.is_complete if check else bool(tally.taken or tally.no_place)
    raise typer.Exit(1 if is_left else 0)


def _entry(name: str | None, routes_file: Path | None, settings: Settings) -> RouteEntry | None:
    """The route that the options name; None without ``--route``."""
    if name is None and routes_file is None:
        return None
    if name is None:
        raise InvalidInput("--routes needs --route: the records of one route are compared")
    file = routes_file or settings.documents.routes
    if file is None:
        raise InvalidInput("--route needs a file of routes: name it by --routes, or set documents.routes")
    return named_entry(load_routes(file), name)


def _reconciler_of(entry: RouteEntry, client: S3Client) -> Reconciler:
    """Compares the objects that the route takes with the records that it makes."""
    if entry.route.sidecar is None:
        raise InvalidInput(f"route {entry.route.name} has no sidecar: no object tells that another has its record")
    return Reconciler(
        client,
        entry.route.sidecar.template,
        route_digest=entry.route.digest,
        takes=lambda *known: entry.why_not(*known) is None,
    )


async def _submit(kafka: KafkaSettings, topic: str, found: Iterator[Unfinished]) -> int:
    """Publish an event for each object, a batch at a time; returns how many the brokers have acknowledged."""
    await require_topics(kafka, [topic])
    submitted = 0
    async with recovering_producer(kafka) as producer:
        sink = KafkaSink(producer)
        while batch := await asyncio.to_thread(_batch, found):
            records = [created_event(topic, one.object) for one in batch]
            await sink.publish(records)
            submitted += len(records)
    return submitted


def _batch(found: Iterator[Unfinished]) -> Sequence[Unfinished]:
    return list(islice((one for one in found if one.state in SUBMITTED), BATCH_EVENTS))


def _printed(found: Iterator[Unfinished], as_json: bool) -> Iterator[Unfinished]:
    for one in found:
        if as_json:
            print_json({"uri": one.object.uri, "state": one.state})
        else:
            print(f"{one.state}\t{plain(one.object.uri).plain}")
        yield one


def _print_summary(tally: Tally, submitted: int, as_json: bool) -> None:
    if as_json:
        print_json({"summary": tally.as_dict() | {"submitted": submitted}})
    else:
        states = ", ".join(f"{number} {state}" for state, number in tally.as_dict().items() if number)
        print(f"{states}; {submitted} submitted", file=sys.stderr)


def _pattern(objects: str) -> ObjectPattern:
    """``objects`` as a pattern: without a wildcard it is a prefix, also without a slash at its end."""
    if "[" not in objects and (parts := split_prefix_uri(objects)):
        return ObjectPattern(parts[0], f"{parts[1]}/" if parts[1] else "")
    pattern = ObjectPattern.of(objects)
    if pattern is None:
        raise InvalidInput(f"{plain(objects).plain} is not of the form s3://bucket/prefix")
    return pattern
