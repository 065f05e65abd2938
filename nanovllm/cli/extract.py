"""``nanovllm extract``: documents into records without Kafka, for trying a route or for a backfill."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from nanovllm.cli.extras import require
from nanovllm.cli.jobs import ConfigOption, JsonOption
from nanovllm.cli.routes import named_entry
from nanovllm.cli.run import ModelOption, engine_settings, require_engine
from nanovllm.cli.sending import MAX_ASKED, listing_of
from nanovllm.errors import InvalidInput, NanoVLLMError, ObjectNotFound, PermanentError, counted
from nanovllm.messages.s3_uri import split_s3_uri
from nanovllm.objects.inventory import list_inventory, read_manifest
from nanovllm.objects.listing import ListedObject, ObjectPattern, find_object
from nanovllm.objects.s3_client import S3Client
from nanovllm.pipeline.routing.routes import Routes, load_routes
from nanovllm.settings.routes import Route
from nanovllm.settings.worker import Settings
from nanovllm.sinks.jsonl import JsonLinesSink
from nanovllm.sinks.sidecar import head_or_none, is_sidecar
from nanovllm.terminal import long_engine_work, long_work, plain, print_json

DOCUMENT_SUFFIXES = frozenset({".pdf", ".tif", ".tiff", ".png", ".jpg", ".jpeg", ".webp"})


def extract(
    sources: Annotated[
        list[str],
        typer.Argument(help="Files, directories, s3:// URIs of objects, of prefixes (with / behind) or globs."),
    ],
    routes_file: Annotated[Path, typer.Option("--routes", "-r", help="YAML file of routes.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the records go, one JSON line each.")],
    route: Annotated[
        str | None, typer.Option("--route", help="Name of the route for all sources; unset: the one that takes each.")
    ] = None,
    inventory: Annotated[
        str | None,
        typer.Option(help="manifest.json of an S3 Inventory that the prefixes and globs are taken from, unlisted."),
    ] = None,
    sidecars: Annotated[
        bool,
        typer.Option(
            "--sidecars",
            help="Write the routes' sidecars too, and pass over objects that have theirs; a worker then makes no "
            "records of them.",
        ),
    ] = False,
    failures: Annotated[
        Path | None, typer.Option(help="Documents without a record; unset: beside the output, as NAME.failures.jsonl.")
    ] = None,
    model: ModelOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Extract documents by a route, as a worker does. What is in the output is not computed again.

    Exit code 1: it was stopped, or a document has no record. Files match a route by name with --route alone.
    """
    require("documents", "pypdfium2", "jsonschema_rs")
    settings = engine_settings(config, model)
    routes = load_routes(routes_file)
    forced = named_entry(routes, route).route if route else None
    require_engine(settings)
    from nanovllm.messages.document_record import DocumentRecord
    from nanovllm.pipeline.extract import FoundDocument, extract_documents

    failures = failures or output.with_name(f"{output.stem}.failures.jsonl")
    codes: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    with JsonLinesSink(output) as records, JsonLinesSink(failures) as failed:
        done = {json.loads(line)["job_id"] for line in records.lines()}
        found = [one for source in sources for one in _find(source, routes, forced, settings, inventory)]
        left = [one for one in found if one.source.job_id(one.route) not in done]
        if len(left) < len(found):
            print(f"{output} goes on: {len(found) - len(left)} done, {len(left)} left", file=sys.stderr)

        def on_record(record: DocumentRecord) -> None:
            records.write(record)
            statuses[record.status] += 1

        def on_failure(one: FoundDocument, error: NanoVLLMError) -> None:
            codes[error.code] += 1
            line = {"job_id": one.source.job_id(one.route), "uri": one.source.uri, "code": error.code}
            failed.append(json.dumps(line | {"message": str(error), "retryable": error.retryable}).encode())

        same = 0

        def on_same(one: FoundDocument) -> None:
            nonlocal same
            same += 1

        is_finished = True
        if left:
            with long_engine_work("extracting", len(left)) as show:
                is_finished = extract_documents(
                    settings,
                    left,
                    on_record,
                    on_failure,
                    on_same,
                    page_store=routes.page_store,
                    with_sidecars=sidecars,
                    on_tick=lambda: show(statuses.total() + codes.total() + same),
                )
    summary: dict[str, Any] = {"records": dict(statuses), "failures": dict(codes), "same": same}
    summary["is_finished"] = is_finished
    if as_json:
        print_json(summary)
    else:
        print(f"{counted(statuses.total(), 'record')} in {output}{_listed(statuses)}", file=sys.stderr)
        if same:
            print(f"{counted(same, 'document')} with a sidecar of this version and route", file=sys.stderr)
        if codes:
            print(f"{counted(codes.total(), 'document')} without, in {failures}{_listed(codes)}", file=sys.stderr)
        if not is_finished:
            print("stopped before the end: the same command goes on from here", file=sys.stderr)
    raise typer.Exit(0 if is_finished and not codes else 1)


def _listed(counts: Counter[str]) -> str:
    return f" ({', '.join(f'{number} {name}' for name, number in counts.most_common())})" if counts else ""


def _find(
    source: str, routes: Routes, forced: Route | None, settings: Settings, inventory: str | None
) -> Iterator[Any]:
    """The documents that ``source`` names, with their routes; those that no route takes are left out, and counted."""
    from nanovllm.pipeline.documents.extraction import DocumentSource
    from nanovllm.pipeline.extract import FoundDocument

    pattern = ObjectPattern.of(source)
    if inventory is not None and pattern is None:
        raise InvalidInput(f"{plain(source).plain} is no s3:// prefix (with / behind) or glob: --inventory lists those")
    if not source.startswith("s3://"):
        if forced is None:
            raise InvalidInput(f"{source} is no object: name the route of files by --route")
        for path in _files(Path(source)):
            about = path.stat()
            version = f"{about.st_size}-{about.st_mtime_ns}"
            yield FoundDocument(DocumentSource(str(path), etag=version), forced, path.read_bytes)
        return
    client = S3Client(settings.s3)
    objects: Iterable[ListedObject]
    if pattern is None:
        objects = [_object(client, source)]
    elif inventory is None:
        objects = listing_of(settings.s3)(pattern)
    else:
        objects = _as_they_are(client, list_inventory(client, read_manifest(client, inventory), pattern))
    left_out = 0
    with ThreadPoolExecutor(MAX_ASKED) as pool:
        for one, route in pool.map(lambda one: (one, _route_of(client, routes, forced, one)), objects):
            if route is None:
                left_out += 1
                continue
            bucket, key = split_s3_uri(one.uri) or ("", "")
            yield FoundDocument(
                DocumentSource(one.uri, etag=one.etag), route, partial(_read, client, bucket, key, one.etag)
            )
    if left_out:
        print(f"{source}: {counted(left_out, 'object')} that no route takes left out", file=sys.stderr)


def _object(client: S3Client, uri: str) -> ListedObject:
    try:
        return find_object(client, uri)
    except ObjectNotFound as error:
        raise InvalidInput(f"{plain(uri).plain} is no object ({error}); of a prefix write the / behind it") from None


def _route_of(client: S3Client, routes: Routes, forced: Route | None, one: ListedObject) -> Route | None:
    """The route of a listed object: ``forced`` for all but records, or the one that takes it.

    Whether it is a record, and its content type where that decides, the store is asked.
    """
    bucket, key = split_s3_uri(one.uri) or ("", "")
    content_type = None
    if forced is not None or routes.needs_head(bucket, key):
        answer = client.call(lambda s3: head_or_none(s3, bucket, key)) or {}
        if is_sidecar(answer.get("Metadata", {})):
            return None
        content_type = answer.get("ContentType")
    return forced or routes.route_of(bucket, key, content_type, one.size)


def _as_they_are(client: S3Client, listed: Iterable[ListedObject]) -> Iterator[ListedObject]:
    """What the objects of an inventory are now: its lists were begun hours before, and may lack the entity tag.

    Those that are gone are left out, and counted. One that may not be asked for stays: reading it says why.
    """

    def ask(one: ListedObject) -> ListedObject | None:
        try:
            return find_object(client, one.uri)
        except ObjectNotFound:
            return None
        except PermanentError:
            return one

    gone = 0
    with long_work("asking for the inventory's objects"), ThreadPoolExecutor(MAX_ASKED) as pool:
        for one in pool.map(ask, listed):
            if one is None:
                gone += 1
            else:
                yield one
    if gone:
        print(f"{counted(gone, 'object')} of the inventory left out, gone since", file=sys.stderr)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in DOCUMENT_SUFFIXES and file.is_file())
    else:
        found = [path] if path.is_file() else []
    if not found:
        raise InvalidInput(f"{path}: no such file, and no documents are found there")
    return found


def _read(client: S3Client, bucket: str, key: str, etag: str) -> bytes:
    """The listed version's bytes; ObjectChanged where the object is another one by now."""
    data: bytes = client.call(lambda s3: s3.get_object(Bucket=bucket, Key=key, IfMatch=f'"{etag}"')["Body"].read())
    return data
