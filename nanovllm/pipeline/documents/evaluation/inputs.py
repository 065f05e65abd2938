"""Truths and results, read from JSON lines and brought together by the documents' URIs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from nanovllm.errors import InvalidInput
from nanovllm.messages.document_record import DocumentRecord


class Truth(BaseModel):
    """One line of the truth: what a document's record should have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str = Field(min_length=1, description="The record's `document.uri`, or the end of it behind a slash.")
    value: JsonValue = Field(description="What `value` should be.")
    pages: Annotated[int, Field(ge=1)] | frozenset[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="Pages that should have an answer: their number, or a list of page numbers."
    )

    @property
    def page_numbers(self) -> frozenset[int] | None:
        """The pages that should have an answer; None where it is not said."""
        return frozenset(range(1, self.pages + 1)) if isinstance(self.pages, int) else self.pages


class Failure(BaseModel):
    """One line of ``NAME.failures.jsonl``, which ``nanovllm extract`` writes."""

    uri: str
    code: str


@dataclass
class Results:
    """Records and failures of a run, in the order of the files."""

    records: list[DocumentRecord] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


@dataclass
class Found:
    """What a run has of one document of the truth."""

    records: list[DocumentRecord] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @property
    def record(self) -> DocumentRecord | None:
        """The record that is scored: the last, which the others came before."""
        return self.records[-1] if self.records else None


def read_truths(path: Path) -> list[Truth]:
    """The truths of a file.

    Raises:
        InvalidInput: a line is no truth, two name one document, or there is none.
    """
    lines: dict[str, int] = {}
    truths = []
    for number, line in _lines(path):
        try:
            truth = Truth.model_validate_json(line)
        except ValidationError as error:
            what = 'no truth, such as {"uri": "s3://bucket/a.pdf", "value": {}}'
            raise InvalidInput(f"{path}:{number}: {what}: {_first(error)}") from None
        if truth.uri in lines:
            raise InvalidInput(f"{path}:{number}: {truth.uri} stands in line {lines[truth.uri]} already: keep one")
        lines[truth.uri] = number
        truths.append(truth)
    if not truths:
        raise InvalidInput(f"{path}: has no line: there is nothing to compare with")
    return truths


def read_results(path: Path, route: str | None = None) -> Results:
    """The records of a file (of ``route``, where it is given), and failures from it and the file of failures beside it.

    Raises:
        InvalidInput: a line is neither, or names a record in S3, whose value is not here.
    """
    results = Results()
    beside = path.with_name(f"{path.stem}.failures.jsonl")
    for file in [path, *([beside] if beside.is_file() and beside != path else [])]:
        for number, line in _lines(file):
            one = _record_or_failure(line, f"{file}:{number}")
            if isinstance(one, Failure):
                results.failures.append(one)
            elif route is None or one.route.name == route:
                results.records.append(one)
    return results


def match_documents(truths: Sequence[Truth], results: Results) -> tuple[dict[str, Found], list[str]]:
    """What ``results`` have by each truth's URI, and the URIs of documents without a truth.

    Raises:
        InvalidInput: a truth's URI is the end of several documents', or a document has records of several routes.
    """
    found = {truth.uri: Found() for truth in truths}
    named: dict[str, set[str]] = defaultdict(set)
    unknown: dict[str, None] = {}
    everything: list[DocumentRecord | Failure] = [*results.records, *results.failures]
    for one in everything:
        uri = one.document.uri if isinstance(one, DocumentRecord) else one.uri
        name = next((end for end in _ends(uri) if end in found), None)
        if name is None:
            unknown[uri] = None
            continue
        named[name].add(uri)
        if isinstance(one, DocumentRecord):
            found[name].records.append(one)
        else:
            found[name].failures.append(one)
    for name, uris in named.items():
        if len(uris) > 1:
            raise InvalidInput(
                f"the truth's {name} is the end of {' and '.join(sorted(uris)[:2])}: write more of its path"
            )
        routes = sorted({record.route.name for record in found[name].records})
        if len(routes) > 1:
            raise InvalidInput(f"{name} has records of the routes {', '.join(routes)}: choose one by --route")
    return found, list(unknown)


def _ends(uri: str) -> Iterator[str]:
    """``uri``, and what stands behind each of its slashes, longest first."""
    yield uri
    for at, character in enumerate(uri):
        if character == "/":
            yield uri[at + 1 :]


def _record_or_failure(line: bytes, place: str) -> DocumentRecord | Failure:
    try:
        value = json.loads(line)
        kind: Any = DocumentRecord if isinstance(value, Mapping) and "document" in value else Failure
        one: DocumentRecord | Failure = kind.model_validate_json(line)
    except ValueError as error:
        raise InvalidInput(f"{place}: neither a document record nor a failure: {_first(error)}") from None
    if isinstance(one, DocumentRecord) and one.stored is not None:
        raise InvalidInput(f"{place}: the record is in S3 ({one.stored.uri}): put its line in place of this one")
    return one


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror or error}") from None


def _first(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"
