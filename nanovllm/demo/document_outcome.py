"""Outcome of the documents part: the records against the truth, where each page's answer came from, the events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nanovllm.demo.documents import LETTERS, DemoDocument, DemoDocuments
from nanovllm.messages.document_record import DocumentRecord, FieldMeta, PageUse

MIN_EXACT_SHARE = 0.9


@dataclass(frozen=True)
class PageValue:
    """One value of a page, beside what it should be and what is known about it."""

    name: str
    value: Any
    truth: str
    meta: FieldMeta

    @property
    def is_exact(self) -> bool:
        """Whether the value is the truth, character by character."""
        return bool(self.value == self.truth)


@dataclass(frozen=True)
class DocumentSummary:
    """The documents' part of ``summary.json``; all are 0 in a run without documents.

    ``events_skipped`` led to no record of their own, ``pages_from_text`` were read from their text layer.
    """

    documents: int = 0
    records: int = 0
    pages: int = 0
    pages_reused: int = 0
    pages_from_text: int = 0
    values: int = 0
    values_exact: int = 0
    events: int = 0
    events_skipped: int = 0


@dataclass(frozen=True)
class DocumentOutcome:
    """What came of the documents.

    ``records`` are those of the topic by URI, ``sidecars`` those beside the objects by key; ``ended`` counts the events
    by what came of them, ``seconds`` went by from the first event to the end of the last.
    """

    demo: DemoDocuments
    records: Mapping[str, DocumentRecord]
    sidecars: Mapping[str, DocumentRecord | None]
    ended: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def record_of(self, document: DemoDocument) -> DocumentRecord | None:
        """The document's record, None where none came."""
        return self.records.get(document.uri)

    def pages_of(self, document: DemoDocument) -> tuple[PageUse, ...]:
        """The pages of its record, in their order."""
        record = self.record_of(document)
        return () if record is None else record.pages

    def values_of(self, document: DemoDocument, number: int) -> tuple[PageValue, ...]:
        """The values of page ``number`` (from 1); of pages without an answer, and of letters, there are none."""
        record = self.record_of(document)
        values = record.value if record is not None and isinstance(record.value, list) else []
        if record is None or number > len(values) or not isinstance(values[number - 1], dict):
            return ()
        return tuple(
            PageValue(name, values[number - 1].get(name), truth, record.fields[f"/{number - 1}/{name}"])
            for name, truth in document.truths[number - 1].items()
        )

    @cached_property
    def summary(self) -> DocumentSummary:
        """The figures in short."""
        documents = self.demo.documents
        pages = [page for document in documents for page in self.pages_of(document)]
        values = list(self._values())
        return DocumentSummary(
            documents=len(documents),
            records=sum(self.record_of(document) is not None for document in documents),
            pages=self.demo.pages,
            pages_reused=sum(page.reused for page in pages),
            pages_from_text=sum(page.source == "text_layer" for page in pages),
            values=sum(len(truth) for document in documents for truth in document.truths),
            values_exact=sum(value.is_exact for value in values),
            events=len(self.demo.events),
            events_skipped=self.ended.total() - self.ended["result"],
        )

    def _values(self) -> Iterator[PageValue]:
        for document in self.demo.documents:
            for number in range(1, len(document.truths) + 1):
                yield from self.values_of(document, number)

    @cached_property
    def complaints(self) -> tuple[str, ...]:
        """What is not as it should be, in sentences."""
        summary = self.summary
        found = []
        if summary.records < summary.documents:
            found.append(f"{summary.documents - summary.records} of {summary.documents} documents have no record")
        if summary.values_exact < MIN_EXACT_SHARE * summary.values:
            found.append(f"only {summary.values_exact} of {summary.values} values of documents are exactly right")
        if any(self.sidecars.get(one.key) != self.record_of(one) for one in self.demo.documents):
            found.append("a record in the topic is not the one beside its document")
        if summary.pages_reused != self.demo.shared_pages:
            found.append(f"{summary.pages_reused} pages were reused, {self.demo.shared_pages} should have been")
        if summary.pages_from_text != sum(one.route == LETTERS for one in self.demo.documents):
            found.append("the letter was not read from its own text")
        if dict(self.ended) != {"result": summary.documents, "same": 1}:
            found.append(f"the events ended otherwise than in a record each, and the repeated one: {dict(self.ended)}")
        return tuple(found)
