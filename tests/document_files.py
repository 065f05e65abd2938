"""Documents of receipts, and a route that reads them with the shipped model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from random import Random
from typing import Any

from fpdf import FPDF
from PIL import Image

from nanovllm.training.synthetic import DEMO_SEED, Receipt, generator, receipt

FIELDS = ("vendor", "number", "date", "total")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {name: {"type": "string", "maxLength": 40} for name in FIELDS},
    "required": list(FIELDS),
    "additionalProperties": False,
}


def receipts_pdf(images: Sequence[Image.Image]) -> bytes:
    """A PDF without a text layer, whose pages are ``images`` at 72 dpi."""
    pdf = FPDF(unit="pt", format=(224, 224))
    pdf.set_auto_page_break(False)
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        pdf.add_page()
        pdf.image(buffer, 0, 0, 224, 224)
    return bytes(pdf.output())


def native_receipts_pdf(pages: Sequence[Sequence[str]]) -> bytes:
    """A PDF with a text layer, whose pages are receipts of these lines."""
    pdf = FPDF(unit="pt", format=(224, 224))
    pdf.set_auto_page_break(False)
    pdf.set_font("Courier", size=11)
    for lines in pages:
        pdf.add_page()
        for index, line in enumerate(lines):
            pdf.text(8, 24 + 30 * index, line)
    return bytes(pdf.output())


def drawn(count: int, *, first: int = 0) -> list[Receipt]:
    """Receipts that the shipped model has not seen."""
    numbers = range(first, first + count)
    return [receipt(generator(number, seed=DEMO_SEED, split="heldout"), "heldout") for number in numbers]


def shared_pages(random: Random, lengths: Sequence[int], *, share: float, times: int = 4) -> list[list[int]]:
    """The numbers of the receipts on the pages of documents of these lengths.

    ``share`` of the pages stand in about ``times`` documents each, the others once.
    """
    slots = [(document, page) for document, length in enumerate(lengths) for page in range(length)]
    shared = random.sample(slots, round(share * len(slots)))
    numbers = {slot: number for number, slot in enumerate(slots)}
    # Of neighbours in order, none has its page twice in one document, unless it has more pages than the pool.
    pool = max(len(shared) // times, 1)
    for position, slot in enumerate(sorted(shared)):
        numbers[slot] = len(slots) + position % pool
    return [[numbers[document, page] for page in range(length)] for document, length in enumerate(lengths)]


def receipts_route(bucket: str, key: str = "in/**/*.pdf", **fields: Any) -> dict[str, Any]:
    """A route of receipts, one value a page."""
    return {
        "name": "receipts",
        "match": {"bucket": bucket, "key": key},
        "prompt": "Extract the fields as JSON: <|image|>",
        "response_schema": SCHEMA,
        "merge": "per_page",
        "pages": {"dpi": 72},
        "sampling": {"temperature": 0, "max_tokens": 96},
        "sidecar": {},
        **fields,
    }
