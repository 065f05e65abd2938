"""Documents of the demo: PDFs of receipts with their exact truth, the routes that take them, and what one shares.

The first is a scan of four pages. The second repeats the last of them, and its other page has recognised text beside
its picture, as scanners add it: values have evidence there. The third was written by a program, and needs no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from nanovllm.demo.jobs import BUCKET
from nanovllm.demo.pdf import ADVANCE_EM, PdfPage, TextLine, pdf_of
from nanovllm.training.synthetic import ADVANCE_PX, DEMO_SEED, FIELDS, PROMPTS, SIZE_PX, Receipt, generator, receipt

PREFIX = "documents"
SCANS, LETTERS = "scans", "letters"
LETTER = (
    "Dear customer,",
    "",
    "thank you for your order of 23 March 2026, which has",
    "left our warehouse today. We have received your",
    "payment of EUR 118.40 for two boxes of tea and one",
    "kettle; this letter is your receipt.",
    "",
    "With kind regards, the Copper Kettle",
)
_FIRST_RECEIPT = 700  # behind those that jobs ask about: no picture of theirs is seen again


@dataclass(frozen=True)
class DemoDocument:
    """One PDF in the demo's bucket, the route that takes it, and the fields of each of its pages (none: a letter)."""

    key: str
    route: str
    data: bytes
    truths: tuple[Mapping[str, str], ...]

    @property
    def uri(self) -> str:
        """The object that its event names."""
        return f"s3://{BUCKET}/{self.key}"

    @property
    def sidecar_key(self) -> str:
        """Where its record is written."""
        return f"{self.key}.json"


@dataclass(frozen=True)
class DemoDocuments:
    """Everything that the documents part stores and sends: an event for each document, one of them twice."""

    documents: tuple[DemoDocument, ...]
    repeated: DemoDocument
    shared_pages: int

    @property
    def events(self) -> tuple[DemoDocument, ...]:
        """The document of each event, in their order."""
        return (*self.documents, self.repeated)

    @property
    def pages(self) -> int:
        """Pages of all documents."""
        return sum(len(document.truths) for document in self.documents)


def demo_documents() -> DemoDocuments:
    """The demo's documents, always the same ones."""
    drawn = [_receipt(_FIRST_RECEIPT + number) for number in range(5)]
    scan = _document("monday.pdf", SCANS, [_scanned(one) for one in drawn[:4]], drawn[:4])
    second = _document("tuesday.pdf", SCANS, [_scanned(drawn[3]), _recognised(drawn[4])], drawn[3:])
    lines = tuple(TextLine(line, 40, 60 + 18 * at) for at, line in enumerate(LETTER) if line)
    letter = DemoDocument(f"{PREFIX}/{LETTERS}/order.pdf", LETTERS, pdf_of([PdfPage(420, 298, lines=lines)]), ({},))
    return DemoDocuments((scan, second, letter), repeated=scan, shared_pages=1)


def routes() -> dict[str, Any]:
    """The content of the demo's routes file."""
    schema = {
        "type": "object",
        "properties": {name: {"type": "string", "maxLength": 40} for name in FIELDS},
        "required": list(FIELDS),
        "additionalProperties": False,
    }
    scans = {
        "name": SCANS,
        "match": {"bucket": BUCKET, "key": f"{PREFIX}/{SCANS}/*.pdf"},
        "prompt": PROMPTS["json"],
        "response_schema": schema,
        "merge": "per_page",
        "pages": {"dpi": 72},
        "sampling": {"temperature": 0, "max_tokens": 96},
        "sidecar": {},
    }
    letters = {
        "name": LETTERS,
        "match": {"bucket": BUCKET, "key": f"{PREFIX}/{LETTERS}/*.pdf"},
        "prompt": PROMPTS["text"],
        "text": "only_if_clean",
        "pages": {"dpi": 72},
        "sampling": {"temperature": 0, "max_tokens": 96},
        "sidecar": {},
    }
    return {"version": 1, "page_store": f"s3://{BUCKET}/pages", "routes": [scans, letters]}


def write_routes(path: Path) -> None:
    """Write the routes file."""
    path.write_text(yaml.safe_dump(routes(), sort_keys=False), encoding="utf-8")


def _receipt(number: int) -> Receipt:
    return receipt(generator(number, seed=DEMO_SEED, split="heldout"), "heldout")


def _document(name: str, route: str, pages: list[PdfPage], receipts: list[Receipt]) -> DemoDocument:
    return DemoDocument(f"{PREFIX}/{route}/{name}", route, pdf_of(pages), tuple(one.fields for one in receipts))


def _scanned(drawn: Receipt) -> PdfPage:
    return PdfPage(SIZE_PX, SIZE_PX, drawn.image)


def _recognised(drawn: Receipt) -> PdfPage:
    """The scanned page with its characters under the picture, each where it is printed."""
    rows = [list(row) for _, row in groupby(drawn.glyphs, lambda glyph: glyph.y)]
    lines = tuple(
        TextLine(line, row[0].x - ADVANCE_PX / 2, row[0].y + 5) for line, row in zip(drawn.lines, rows, strict=True)
    )
    return PdfPage(SIZE_PX, SIZE_PX, drawn.image, lines, size=ADVANCE_PX / ADVANCE_EM, is_visible=False)
