"""``nanovllm reconcile``: objects without records are found and submitted, or reported by the exit code."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Annotated

import typer

from nanovllm.cli.jobs import BrokersOption, ConfigOption, JsonOption, client_settings
from nanovllm.client.connection import recovering_producer
from nanovllm.client.reconcile import SUBMITTED, Reconciler, Tally, Unfinished, created_event
from nanovllm.errors import InvalidInput
from nanovllm.kafka.topic_presence import require_topics
from nanovllm.messages.s3_uri import split_prefix_uri
from nanovllm.objects.inventory import list_inventory, read_manifest
from nanovllm.objects.listing import ObjectPattern, list_objects
from nanovllm.objects.s3_client import S3Client, check_settings, make_client
from nanovllm.settings.kafka import KafkaSettings
from nanovllm.sinks.kafka import KafkaSink
from nanovllm.terminal import long_work, plain, print_json

BATCH_EVENTS = 256


def reconcile(
    objects: Annotated[str, typer.Argument(help="s3://bucket, s3://bucket/prefix, or a glob such as …/**/*.pdf.")],
    sidecars: Annotated[
        str,
        typer.Option(help="Where records lie: s3://… with the object's {key} and, where needed, {bucket}."),
    ] = "s3://{bucket}/{key}.json",
    inventory: Annotated[
        str | None, typer.Option(help="manifest.json of an S3 Inventory to take objects from: no listing is made.")
    ] = None,
    route_digest: Annotated[
        str | None, typer.Option(help="Records of another route digest do not count; unset: all do.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Submit nothing; exit code 1 when an object has no record.")
    ] = False,
    topic: Annotated[str | None, typer.Option(help="Topic of events, to which the objects are submitted.")] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    bootstrap_servers: BrokersOption = None,
) -> None:
    """Find objects without a record of what they are now, and submit each as an event of its creation.

    Each is printed with its state; exit code 1 when objects are left that no event would help.
    """
    if not check and topic is None:
        raise InvalidInput("name the topic of events (--topic), or --check to submit nothing")
    settings = client_settings(config, bootstrap_servers)
    pattern = _pattern(objects)
    check_settings(settings.s3)
    s3 = settings.s3
    client = S3Client(s3, partial(make_client, max_attempts=s3.max_attempts))
    reconciler = Reconciler(client, sidecars, route_digest=route_digest)
    if inventory is None:
        listed = list_objects(s3, pattern)
    else:
        listed = list_inventory(client, read_manifest(client, inventory), pattern)
    with long_work(f"comparing {plain(objects).plain} with its records"):
        found = _printed(reconciler.unfinished(listed), as_json)
        if check or topic is None:
            for _ in found:
                pass
            submitted = 0
        else:
            submitted = asyncio.run(_submit(settings.kafka, topic, found))
    tally = reconciler.tally
    _print_summary(tally, submitted, as_json)
    is_left = not tally.is_complete if check else bool(tally.taken or tally.no_place)
    raise typer.Exit(1 if is_left else 0)


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
        print(f"{states or 'no objects'}; {submitted} submitted", file=sys.stderr)


def _pattern(objects: str) -> ObjectPattern:
    """``objects`` as a pattern: without a wildcard it is a prefix, also without a slash at its end."""
    if parts := split_prefix_uri(objects):
        return ObjectPattern(parts[0], f"{parts[1]}/" if parts[1] else "")
    pattern = ObjectPattern.of(objects)
    if pattern is None:
        raise InvalidInput(f"{plain(objects).plain} is not of the form s3://bucket/prefix")
    return pattern
