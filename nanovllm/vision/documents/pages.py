"""Documents as pages: media type by content, limits, page ranges, and one interface for PDFs and image files."""

from __future__ import annotations

import math
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from PIL import Image

from nanovllm.errors import (
    ConfigurationError,
    DocumentTooLarge,
    InvalidDocument,
    InvalidPageRange,
    PageTooLarge,
    TooManyPages,
    UnsupportedDocumentFormat,
    counted,
)
from nanovllm.vision.images.decode import DEFAULT_LIMITS, ImageLimits, sniffed_format

if TYPE_CHECKING:
    from nanovllm.vision.documents.text_layer import TextLayer

PDF = "application/pdf"
POINTS_PER_INCH = 72
DEFAULT_DPI = 150.0
MAX_DPI = 2400
ROTATIONS = (0, 90, 180, 270)
MAX_RANGE_PARTS = 1_000
_PDF_HEADER_BYTES = 1024  # readers accept the header within them (PDF 1.7, appendix H.3)
_SIZE = struct.Struct(">dd")

# First bytes of files that are taken for documents by their names; a refusal names them.
_FOREIGN = {
    "a ZIP archive (an Office or OpenDocument file is one)": rb"PK(\x03\x04|\x05\x06)",
    "an older Office file (OLE)": rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "PostScript": rb"%!PS",
    "RTF": rb"\{\\rtf",
    "HTML": rb"\s*(?i:<!doctype html|<html)",
    "XML": rb"\s*<\?xml",
    "gzip": rb"\x1f\x8b",
}


@dataclass(frozen=True)
class DocumentLimits:
    """Limits of a document and its pages.

    ``max_pixels`` are of a rendered page: a larger one is rendered at a lower resolution, down to ``min_dpi``.
    """

    max_bytes: int = 128 * 2**20
    max_pages: int = 10_000
    max_pixels: int = 50_000_000
    min_dpi: float = 36.0
    max_page_characters: int = 200_000


DEFAULT_DOCUMENT_LIMITS = DocumentLimits()


@dataclass(frozen=True)
class PageInfo:
    """Page of a document: its number from 1, and its size as it is shown, in points (1/72 inch)."""

    number: int
    width_pt: float
    height_pt: float


@dataclass(frozen=True)
class DocumentInfo:
    """What is known of a document without rendering a page.

    ``digest`` is SHA-256 (32 bytes) of its bytes, by which decoder processes find it again.
    """

    media_type: str
    pages: tuple[PageInfo, ...]
    digest: bytes = b""

    def sizes(self) -> bytes:
        """Sizes of the pages, packed; the inverse of `from_sizes`."""
        return b"".join(_SIZE.pack(page.width_pt, page.height_pt) for page in self.pages)

    @classmethod
    def from_sizes(cls, media_type: str, sizes: bytes, digest: bytes) -> Self:
        """Document of what a decoder process answered.

        Raises:
            ValueError: it is none.
        """
        if not sizes or len(sizes) % _SIZE.size:
            raise ValueError("a document has pages with two sides each")
        pairs = [*_SIZE.iter_unpack(sizes)]
        if not all(0 < side < math.inf for pair in pairs for side in pair):
            raise ValueError("the sides of a page are positive")
        return cls(media_type, tuple(PageInfo(number, *pair) for number, pair in enumerate(pairs, 1)), digest)


class Document(ABC):
    """An open document; not for several threads."""

    info: DocumentInfo

    @abstractmethod
    def render(self, page: int, *, dpi: float, rotation: int, max_pixels: int) -> Image.Image:
        """Page ``page`` (from 1) as RGB on white, turned clockwise by ``rotation`` degrees."""

    @abstractmethod
    def text(self, page: int) -> TextLayer:
        """Text layer of page ``page`` (from 1)."""

    @abstractmethod
    def close(self) -> None:
        """Release the memory of the document."""


def open_document(
    data: bytes, limits: DocumentLimits = DEFAULT_DOCUMENT_LIMITS, images: ImageLimits = DEFAULT_LIMITS
) -> Document:
    """Open a PDF, a TIFF with any number of pages, or an image of another allowed format, told by its first bytes.

    Raises:
        DocumentTooLarge, TooManyPages, PageTooLarge: beyond a limit.
        DocumentEncrypted: it needs a password.
        UnsupportedDocumentFormat: neither a PDF nor an image of an allowed format.
        InvalidDocument, InvalidImage: it cannot be read.
    """
    check_bytes(data, limits)
    media_type = media_type_of(data)
    if media_type == PDF:
        from nanovllm.vision.documents.pdf import PdfDocument

        return PdfDocument(data, limits)
    if media_type is None:
        raise _unknown(data)
    from nanovllm.vision.documents.tiff import ImageDocument

    return ImageDocument(data, limits, images)


def check_bytes(data: bytes, limits: DocumentLimits) -> None:
    """Refuse a document without bytes, or with too many.

    Raises:
        InvalidDocument, DocumentTooLarge: as said.
    """
    if not data:
        raise InvalidDocument("the document is empty: 0 bytes")
    if len(data) > limits.max_bytes:
        raise DocumentTooLarge(f"the document has {len(data)} bytes; {limits.max_bytes} are allowed")


def check_pages(n_pages: int, limits: DocumentLimits) -> None:
    """Refuse a document of more pages than allowed.

    Raises:
        TooManyPages: as said.
    """
    if n_pages > limits.max_pages:
        raise TooManyPages(f"the document has {n_pages} pages or more; {limits.max_pages} are allowed")


def media_type_of(data: bytes) -> str | None:
    """Media type by the first bytes, whatever a name or header says; None for what is no document."""
    image = sniffed_format(data)
    if image == "PDF" or (image is None and b"%PDF-" in data[:_PDF_HEADER_BYTES]):
        return PDF
    if image is None or image in ("MP4", "PSD", "SVG"):
        return None
    return "image/jp2" if image == "JPEG2000" else f"image/{image.lower()}"


def scale_within(width_pt: float, height_pt: float, dpi: float, max_pixels: int, limits: DocumentLimits) -> float:
    """Pixels a point at which a page has ``dpi``, or the most pixels that are allowed.

    Raises:
        PageTooLarge: the resolution would be below ``limits.min_dpi``.
    """
    bound = min(max_pixels, limits.max_pixels)
    scale = dpi / POINTS_PER_INCH
    if math.ceil(width_pt * scale) * math.ceil(height_pt * scale) <= bound:
        return scale
    # Sides are rounded up: (width * scale + 1) * (height * scale + 1) = bound gives the scale.
    area, half = width_pt * height_pt, (width_pt + height_pt) / 2
    scale = max(0.0, (math.sqrt(half**2 - area * (1 - bound)) - half) / area)
    if scale * POINTS_PER_INCH < min(limits.min_dpi, dpi):
        width, height = width_pt / POINTS_PER_INCH, height_pt / POINTS_PER_INCH
        raise PageTooLarge(
            f"a page of {width:.3g}x{height:.3g} inches within {bound} pixels has {scale * POINTS_PER_INCH:.3g} dpi; "
            f"{limits.min_dpi:g} are needed"
        )
    return scale


def check_rendering(dpi: float, rotation: int, max_pixels: int) -> None:
    """Refuse a resolution, rotation or bound of pixels that no page can have.

    Raises:
        ConfigurationError: as said.
    """
    if rotation not in ROTATIONS:
        raise ConfigurationError(f"a page is rotated by 0, 90, 180 or 270 degrees, not by {rotation}")
    if not 1 <= dpi <= MAX_DPI:
        raise ConfigurationError(f"a page is rendered at 1 to {MAX_DPI} dpi, not at {dpi:g}")
    if max_pixels < 1:
        raise ConfigurationError(f"a page is rendered within 1 pixel or more, not {max_pixels}")


def parse_page_range(text: str, n_pages: int) -> list[int]:
    """Page numbers of a range such as ``1-3,7,-1`` in a document of ``n_pages``, in their order and each once.

    A number below zero counts from the end, ``-1`` is the last page; ``5-`` is from page 5 on, and ``all`` is all.
    Pages behind the end of the document are left out: one range serves documents of any length.

    Raises:
        InvalidPageRange: not such a range, or one that holds no page of the document.
    """
    if text.strip() == "all":
        return list(range(1, n_pages + 1))
    parts = text.split(",")
    if len(parts) > MAX_RANGE_PARTS:
        raise InvalidPageRange(f"a page range has {len(parts)} parts; {MAX_RANGE_PARTS} are allowed")
    pages: dict[int, None] = {}
    for part in parts:
        match = re.fullmatch(r"\s*(-?\d{1,9})\s*(?:(-)\s*(-?\d{1,9})?)?\s*", part, re.ASCII)
        if match is None or 0 in (int(match[1]), int(match[3] or 1)):
            raise InvalidPageRange(f"{part[:40]!r} is no page range; write 1-3,7,-1 with pages from 1, or all")
        first = _from_start(int(match[1]), n_pages)
        last = first if match[2] is None else _from_start(int(match[3] or -1), n_pages)
        if match[3] and (int(match[1]) < 0) == (int(match[3]) < 0) and last < first:
            raise InvalidPageRange(f"the page range {part[:40]!r} ends before it begins")
        pages |= dict.fromkeys(range(max(1, first), min(last, n_pages) + 1))
    if not pages:
        raise InvalidPageRange(f"the page range {text[:80]!r} holds none of the document's {counted(n_pages, 'page')}")
    return list(pages)


def checked_page(page: int, info: DocumentInfo) -> PageInfo:
    """Page ``page`` of a document, counted from 1.

    Raises:
        InvalidPageRange: there is no such page.
    """
    if not 1 <= page <= len(info.pages):
        raise InvalidPageRange(f"the document has {counted(len(info.pages), 'page')}, and no page {page}")
    return info.pages[page - 1]


def quarter_turned(rgb: Image.Image, rotation: int) -> Image.Image:
    """The image, turned clockwise by ``rotation`` degrees; Pillow counts the other way."""
    turns: Sequence[Image.Transpose] = (
        Image.Transpose.ROTATE_270,
        Image.Transpose.ROTATE_180,
        Image.Transpose.ROTATE_90,
    )
    return rgb if rotation == 0 else rgb.transpose(turns[rotation // 90 - 1])


def _from_start(number: int, n_pages: int) -> int:
    return number if number > 0 else n_pages + 1 + number


def _unknown(data: bytes) -> UnsupportedDocumentFormat:
    seen = next((name for name, mark in _FOREIGN.items() if re.match(mark, data)), None)
    what = "are " + seen if seen else "are no PDF and no image"
    return UnsupportedDocumentFormat(f"the {len(data)} bytes {what}; documents are PDFs, TIFFs and images")
