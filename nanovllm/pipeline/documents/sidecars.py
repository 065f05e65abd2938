"""Sidecars of records: which form a route wants, where it goes, and whether one is there already."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from nanovllm.engine.outputs import ModelInfo
from nanovllm.errors import ObjectForbidden, ObjectNotFound, StoreUnreachable
from nanovllm.messages.document_record import DocumentRecord
from nanovllm.messages.encoding import encode
from nanovllm.messages.s3_uri import split_object_uri
from nanovllm.pipeline.documents.extraction import DocumentSource
from nanovllm.settings.routes import Route, SidecarFormat
from nanovllm.sinks.sidecar import IsNewer, Sidecar, SidecarMetadata, SidecarOutcome, SourceVersion, sidecar_uri


class Sidecars:
    """Writes and finds the sidecars of a route's records. ``call`` is an ``S3Client.call``.

    Where ``is_newer`` cannot tell which of two versions came later, what the source is now decides.
    """

    def __init__(
        self, call: Callable[[Callable[[Any], Any]], Any], is_newer: IsNewer = lambda one, other: None
    ) -> None:
        self._sidecar = Sidecar(call, is_newer)

    async def beside(
        self, source: DocumentSource, route: Route, model: ModelInfo, *, delivery: str | None = None
    ) -> SidecarOutcome | None:
        """What ``put`` of this version's record would return without writing; None where it would write.

        Raises:
            StoreUnreachable: the place that the route names is missing, or refuses what it is asked.
            SidecarTaken, InvalidInput, NanoVLLMError: as `Sidecar.put`.
        """
        place = _place(source, route)
        if place is None:
            return None
        uri, version = place
        metadata = SidecarMetadata(source.job_id(route), model.revision, route.digest, version, delivery)
        with _faults_of_place(uri):
            return await self._sidecar.beside(uri, metadata)

    async def put(
        self, record: DocumentRecord, source: DocumentSource, route: Route, *, delivery: str | None = None
    ) -> SidecarOutcome | None:
        """Write the sidecar that the route asks for; None where it asks for none. Raises as ``beside``.

        ``delivery``: as in `SidecarMetadata`.
        """
        place = _place(source, route)
        if place is None or route.sidecar is None:
            return None
        uri, version = place
        metadata = SidecarMetadata(record.job_id, record.model.revision, route.digest, version, delivery)
        with _faults_of_place(uri):
            return await self._sidecar.put(uri, body_of(record, route.sidecar.format), metadata, route.sidecar.format)


def body_of(record: DocumentRecord, fmt: SidecarFormat) -> bytes:
    """The record as JSON; as JSON lines its values, one for each page where pages are not merged; as Markdown its text.

    A record without a schema has its pages' text in place of values, and so has one without a value.
    """
    if fmt == "json":
        return encode(record, "json")
    texts = (record.text or "").split("\f")
    if record.validation is not None and record.value is not None:
        values = record.value if isinstance(record.value, list) else [record.value]
        if fmt == "markdown":
            return _fenced(json.dumps(record.value, indent=2, ensure_ascii=False), "json").encode()
    else:
        values = [{"text": text} for text in texts]
    if fmt == "jsonl":
        return "\n".join(json.dumps(value, ensure_ascii=False) for value in values).encode()
    is_plain = record.validation is not None
    # What a model writes is Markdown; what a page itself says, or a value that is none, is not.
    read = [is_plain or page.source == "text_layer" for page in record.pages]
    read += [is_plain] * (len(texts) - len(read))
    shown = [_fenced(text) if plain else text for text, plain in zip(texts, read, strict=False)]
    return "\n\n---\n\n".join(shown).encode()


def _fenced(text: str, language: str = "text") -> str:
    """``text`` in a fence that it does not contain (CommonMark 0.31, 4.5)."""
    longest = max((len(run) for run in re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


@contextmanager
def _faults_of_place(uri: str) -> Iterator[None]:
    """The place is the route's: what is refused there is no fault of the document."""
    try:
        yield
    except (ObjectNotFound, ObjectForbidden) as error:
        raise StoreUnreachable(
            f"the sidecar {uri} cannot be read or written ({error}); it needs its bucket, and the rights s3:GetObject, "
            "s3:PutObject and s3:ListBucket there"
        ) from error


def _place(source: DocumentSource, route: Route) -> tuple[str, SourceVersion] | None:
    """URI of the sidecar, and the version that it describes; None for local files, and routes without one."""
    parts = split_object_uri(source.uri)
    if parts is None or route.sidecar is None:
        return None
    about = asdict(source)
    del about["uri"]
    version = SourceVersion(*parts, **about)
    return sidecar_uri(route.sidecar.template, *parts), version
